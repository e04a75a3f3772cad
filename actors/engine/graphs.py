"""CUDA graphs of the static step, one a shape, and the one read-back of a step.

A graph repeats kernels with the addresses they were captured with. It stays valid while the tensors it reads and writes
stay where they are: canvases, pages, input buffers and the model's parameters. `Engine.load_weights` copies into the
parameters. What would break it: `load_state_dict(assign=True)`, `model.to(...)`, another page store, a parameter
replaced by another tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

Shape = TypeVar("Shape", bound=Hashable)
Output = TypeVar("Output")


class StepGraphs(Generic[Shape, Output]):
    """Captures `compute` the first time a shape is asked for, then replays it.

    All graphs share one memory pool, since one runs at a time: the room for intermediate results is that of the largest,
    not the sum. So an output holds until the next replay of any shape.

    Args:
        compute: runs the step of a shape on its buffers, without a host sync and without a shape that depends on data.
    """

    def __init__(self, compute: Callable[[Shape], Output], device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Output]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __contains__(self, shape: Shape) -> bool:
        return shape in self._graphs

    def capture(self, shape: Shape) -> None:
        """Run the step twice outside a graph, which compiles its kernels and lets libraries allocate, then record it.

        The two runs do what the input buffers say; the caller has put padding there.
        """
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute(shape)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate or pin memory meanwhile; only this one's calls must be fit for a graph.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self._compute(shape)
        self._graphs[shape] = (graph, output)

    def replay(self, shape: Shape) -> Output:
        """Queue the step; its output is there once the stream has come to it."""
        graph, output = self._graphs[shape]
        graph.replay()
        return output


class ReadBack:
    """Copies a small tensor to the host and waits for that copy only.

    Page-locked memory is kept from call to call, as large as the largest tensor so far: `tolist` of a device tensor
    allocates it anew or goes through a staging copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.empty(0, dtype=torch.int64)
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def __call__(self, tensor: torch.Tensor) -> list[list[int]]:
        """The numbers of an int64 tensor [m, n]."""
        if self._event is None:
            return tensor.tolist()  # type: ignore[no-any-return]
        if self._host.numel() < tensor.numel():
            self._host = torch.empty(tensor.numel(), dtype=torch.int64, pin_memory=True)
        host = self._host[: tensor.numel()].view(tensor.shape)
        host.copy_(tensor, non_blocking=True)
        self._event.record(torch.cuda.current_stream(self._device))
        self._event.synchronize()
        return host.tolist()  # type: ignore[no-any-return]
