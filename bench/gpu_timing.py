"""Times on a CUDA device, by its own events; a replayed CUDA graph where the work can be one.

The engine's step is a CUDA graph, so what a launch costs the host is none of a kernel's business. Several inputs take
turns, or a kernel that reads 4 MB would find them all in the level-2 cache, where no model leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

# Inputs that take turns have this many bytes together: more than twice the 50 to 60 MB of an H100's or H200's cache.
_ROTATION_BYTES = 128 << 20
_MAX_ROTATION = 16
_SAMPLES = 21
# A sample is as many replays as fill this time: event resolution is half a microsecond.
_SAMPLE_S = 2e-3


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call; how: "graph" or, where capture is impossible, "events" (launches included)."""

    seconds: float
    how: str


@dataclass(frozen=True)
class Peaks:
    """What the device reaches: bytes/s of a large copy, read and written, and FLOP/s of a large bf16 product."""

    bytes_per_s: float
    flop_per_s: float

    def floor_s(self, num_bytes: int, flop: int) -> float:
        """Seconds below which nothing can be."""
        return max(num_bytes / self.bytes_per_s, flop / self.flop_per_s)


def rotation(num_bytes: int) -> int:
    """How many inputs take turns for a case of `num_bytes`."""
    return max(1, min(_MAX_ROTATION, -(-_ROTATION_BYTES // max(1, num_bytes))))


def time_call(call: Callable[[Any], object], inputs: Sequence[Any]) -> Timing:
    """Median time of `call` over inputs that take turns."""
    for one in inputs:
        call(one)
    torch.cuda.synchronize()
    graph = _capture(call, inputs)

    def once() -> None:
        if graph is not None:
            graph.replay()
            return
        for one in inputs:
            call(one)

    return Timing(time_repeated(once) / len(inputs), "events" if graph is None else "graph")


def time_repeated(once: Callable[[], object]) -> float:
    """Median seconds of `once`, launched back to back."""
    estimate = max(_elapsed(once, 3), 1e-7)
    count = max(1, int(_SAMPLE_S / estimate))
    return median(_elapsed(once, count) for _ in range(_SAMPLES))


def _elapsed(once: Callable[[], object], count: int) -> float:
    """Seconds of one of `count` calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        once()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def _capture(call: Callable[[Any], object], inputs: Sequence[Any]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for one in inputs:
                call(one)
    except RuntimeError:
        # It reads something back, as eager code may.
        torch.cuda.synchronize()
        return None
    return graph


def measure_peaks(device: torch.device) -> Peaks:
    """The copy and the product by whose rates floors are counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = time_repeated(lambda: target.copy_(source))
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = time_repeated(lambda: a @ b)
    return Peaks(2 * len(source) / copy, 2 * size**3 / product)
