"""`python bench/cases_head.py`: head_confidence, linear_logprob and rms_norm, every implementation side by side.

`cases(device)` lists the ops at the shapes they are used at, with the bytes and the FLOP no implementation can avoid; any
timer can run them. Run as a command it alternates the implementations on this machine, with one thread on the CPU, takes
medians, checks that all agree, prints a table and writes `bench/results/kernels-head-DEVICE.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.kernels.head import head_confidence, tiled
from fewstep.kernels.loss import linear_logprob
from fewstep.kernels.norm import rms_norm
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info

RESULTS = Path(__file__).resolve().parent / "results"
# Whole logits at once: what eager torch does without this project.
UNCHUNKED = 1 << 62


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        shape: the sizes, by the letters of the op's README; dtype: of weights and activations.
        num_bytes: what must cross the memory bus once: inputs read, outputs written.
        flop: multiplications and additions of the matrix products (of the elements, where there is no product).
        implementations: names that `make`'s result takes; the first is eager torch, the baseline.
        make: device to a function that runs one implementation and returns its outputs. The inputs are drawn once,
            from a generator of their own.
    """

    op: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    num_bytes: int
    flop: int
    implementations: tuple[str, ...]
    make: Callable[[torch.device], Callable[[str], Any]]

    @property
    def label(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {str(self.dtype).removeprefix('torch.')} {sizes}"


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _run(device: torch.device, reference: Callable[[str], Any]) -> Callable[[str], Any]:
    """`reference(impl)`, and under the name "compiled" torch.compile of its "reference"."""
    compiled = torch.compile(lambda: reference("reference"), dynamic=False)

    def run(impl: str) -> Any:
        return compiled() if impl == "compiled" else reference(impl)

    return run


def head_case(
    m: int, vocabulary: int, width: int, dtype: torch.dtype, on_gpu: bool, draw: bool = False
) -> Case:
    """M masked rows of a canvas twice as long, greedy or with a draw in each row; entropy only with the draw."""

    def make(device: torch.device) -> Callable[[str], Any]:
        hidden = _normal(device, dtype, 2 * m, width)
        weight = _normal(device, dtype, vocabulary, width) * width**-0.5
        rows = torch.arange(0, 2 * m, 2, device=device)
        temperature = torch.full((m,), 1.0 if draw else 0.0, device=device)
        uniform = torch.linspace(0.01, 0.99, m, dtype=torch.float64, device=device) if draw else None

        def call(impl: str) -> Any:
            return head_confidence(
                hidden,
                rows,
                weight,
                mask_token_id=0,
                temperature=temperature,
                top_p=torch.ones_like(temperature),
                uniform=uniform,
                entropy=draw,
                nucleus=False,
                max_elements=UNCHUNKED if impl == "reference" else 1 << 22,
                impl="reference" if impl == "chunked reference" else impl,
            )

        return _run(device, call)

    implementations = (
        ("reference", "compiled", "fused") if on_gpu else ("reference", "chunked reference", "tiled")
    )
    return Case(
        op="head_confidence" + (" draw" if draw else ""),
        shape={"M": m, "V": vocabulary, "d": width},
        dtype=dtype,
        num_bytes=(vocabulary + m) * width * dtype.itemsize + 20 * m,
        flop=2 * m * vocabulary * width,
        implementations=implementations,
        make=make,
    )


def loss_case(m: int, vocabulary: int, width: int, dtype: torch.dtype, on_gpu: bool) -> Case:
    """Forward and backward of m target rows, gradients of both outputs."""

    def make(device: torch.device) -> Callable[[str], Any]:
        hidden = _normal(device, dtype, m, width).requires_grad_()
        weight = (_normal(device, dtype, vocabulary, width) * width**-0.5).requires_grad_()
        targets = torch.arange(m, device=device) * 7919 % (vocabulary - 1) + 1

        def call(impl: str) -> Any:
            logprob, entropy = linear_logprob(hidden, weight, targets, mask_token_id=0, impl=impl)
            return logprob, entropy, *torch.autograd.grad((logprob + 0.1 * entropy).sum(), (hidden, weight))

        return _run(device, call)

    return Case(
        op="linear_logprob forward+backward",
        shape={"m": m, "V": vocabulary, "d": width},
        dtype=dtype,
        # Weight and hidden are read forward and backward, and the gradient of each is written.
        num_bytes=3 * (vocabulary + m) * width * dtype.itemsize,
        # Three products. What does not keep [m, V] projects twice, so its own floor is 8 · m · V · d.
        flop=6 * m * vocabulary * width,
        implementations=("reference", "compiled", "chunked", "fused") if on_gpu else ("reference", "chunked"),
        make=make,
    )


def norm_case(rows: int, width: int, dtype: torch.dtype, backward: bool) -> Case:
    """Rows of the residual stream (width d) or of queries and keys (width of a head)."""

    def make(device: torch.device) -> Callable[[str], Any]:
        x = _normal(device, dtype, rows, width).requires_grad_(backward)
        weight = _normal(device, dtype, width).requires_grad_(backward)
        grad = _normal(device, dtype, rows, width)

        def call(impl: str) -> Any:
            out = rms_norm(x, weight, 1e-6, impl=impl)
            return (out, *torch.autograd.grad(out, (x, weight), grad)) if backward else (out,)

        return _run(device, call)

    # Forward x, out; backward x and the incoming gradient, x's gradient.
    passes = 5 if backward else 2
    return Case(
        op="rms_norm" + (" forward+backward" if backward else ""),
        shape={"rows": rows, "d": width},
        dtype=dtype,
        num_bytes=passes * rows * width * dtype.itemsize,
        flop=(12 if backward else 4) * rows * width,
        implementations=("reference", "compiled", "fused"),
        make=make,
    )


def cases(device: torch.device) -> list[Case]:
    """GPU: an 8B model's shapes (d = 4,096, LLaDA's vocabulary) in bf16. CPU: what one core does in a second."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if device.type != "cpu":
        return [
            *(head_case(m, 126_464, 4096, bf16, True) for m in (32, 128, 512)),
            *(head_case(m, 126_464, 4096, bf16, True, draw=True) for m in (32, 512)),
            *(loss_case(m, 126_464, 4096, bf16, True) for m in (1024, 4096)),
            *(norm_case(rows, 4096, bf16, False) for rows in (32, 512, 8192)),
            norm_case(512 * 40, 128, bf16, False),
            norm_case(8192, 4096, bf16, True),
        ]
    return [
        *(head_case(m, 32_768, 1024, bf16, False) for m in (32, 128, 256)),
        *(head_case(m, 126_464, 1024, bf16, False) for m in (32, 256)),
        *(head_case(m, 32_768, 1024, bf16, False, draw=True) for m in (32, 256)),
        *(head_case(m, 49_152, 576, fp32, False) for m in (32, 256)),
        *(loss_case(m, vocabulary, 512, bf16, False) for m, vocabulary in ((1024, 4096), (256, 32_768))),
        loss_case(1024, 4096, 512, fp32, False),
    ]


def agree(expected: Any, got: Any, dtype: torch.dtype) -> bool:
    """Whether two implementations' outputs are the same up to rounding of `dtype`."""
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    pairs = [(a, b) for a, b in zip(expected, got, strict=True) if a is not None and a.is_floating_point()]
    return all(
        float((a - b).detach().float().norm()) <= tolerance * float(a.detach().float().norm())
        for a, b in pairs
    )


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each implementation, taken in turn.

    Errors: RuntimeError if two disagree; a fast wrong kernel is no result.
    """
    run = case.make(device)
    names = [
        name for name in case.implementations if device.type != "cpu" or name not in ("fused", "compiled")
    ]
    outputs = {name: run(name) for name in names}
    for name in names[1:]:
        if not agree(outputs[names[0]], outputs[name], case.dtype):
            raise RuntimeError(f"{case.label}: {name} and {names[0]} disagree")
    del outputs
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            _synchronise(device)
            started = time.perf_counter()
            run(name)
            _synchronise(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each implementation")
    parser.add_argument("--out", type=Path, help="result file")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    rows = []
    for case in cases(device):
        times = measure(case, device, arguments.repeats)
        baseline = times[case.implementations[0]]
        rows.append(
            {
                "op": case.op,
                "shape": dict(case.shape),
                "dtype": str(case.dtype),
                "num_bytes": case.num_bytes,
                "flop": case.flop,
                "milliseconds": times,
                "speedup": {name: baseline / value for name, value in times.items()},
            }
        )
        listed = "  ".join(
            f"{name} {value:.2f} ms ({baseline / value:.2f}x)" for name, value in times.items()
        )
        print(f"{case.label}: {listed}", flush=True)
    report = {
        "commit": git_commit(),
        "machine": machine_info(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, 1 thread",
        "repeats": arguments.repeats,
        "unit": "median milliseconds, implementations in turn; speedup over the first one, eager torch",
        "cpu_tile": {
            "tile": tiled.TILE,
            "min_vocabulary": tiled.MIN_VOCABULARY,
            "min_elements": tiled.MIN_ELEMENTS,
        },
        "rows": rows,
    }
    path = arguments.out or RESULTS / f"kernels-head-{device.type}.json"
    atomic_write_text(path, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
