"""The record of one kernel measurement: what `bench/gpu.py` runs, times and holds against a floor.

Each module of MODULES has a function `cases(smoke) -> list[Case]`. Its shapes are those of an 8 B model's denoising step;
with `smoke` they are tiny and run on a CPU in milliseconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MODULES = ("cases_attention", "cases_head")

Inputs = tuple[Any, ...]
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: the op's name; name: the shape in words, unique in its op.
        settings: every number that the shape is made of, for the record.
        make: fresh random inputs on a device, another draw for another seed.
        run: the op on inputs, by the op's own name for an implementation ("fused", "reference"). Returns tensors only.
        eager: what one would write in torch, no less careful than the reference: the rival, also under torch.compile. None
            = run(inputs, "reference").
        num_bytes: that must move at least: every input read and every output written once.
        flop: floating-point operations that must be done, a multiply-add counting as two.
        tolerance: of fused against reference, largest difference over largest magnitude of each output. Outputs that
            are whole numbers or flags must agree in all but `mismatches` of their elements: two candidates that differ by
            less than rounding may fall either way.
        compiled: whether torch.compile of `eager` is timed as well. Compiling takes seconds, so one shape an op is enough.
    """

    op: str
    name: str
    settings: Mapping[str, int | float | str]
    make: Callable[[torch.device, int], Inputs]
    run: Callable[[Inputs, str], Outputs]
    num_bytes: int
    flop: int
    eager: Callable[[Inputs], Outputs] | None = None
    tolerance: float = 2**-6
    mismatches: float = 0.0
    compiled: bool = False

    def rival(self, inputs: Inputs) -> Outputs:
        """Plain torch's answer."""
        return self.run(inputs, "reference") if self.eager is None else self.eager(inputs)

    def complaint(self, got: Outputs, expected: Outputs) -> str | None:
        """Why `got` is not the op's result, if it is not."""
        if len(got) != len(expected):
            return f"{len(got)} outputs; expected: {len(expected)}"
        for index, (have, want) in enumerate(zip(got, expected, strict=True)):
            if have.shape != want.shape or have.dtype != want.dtype:
                return f"output {index} is {have.dtype} {tuple(have.shape)}; expected: {want.dtype} {tuple(want.shape)}"
            if not want.is_floating_point():
                wrong = (have != want).double().mean().item()
                if wrong > self.mismatches:
                    return f"output {index}: {wrong:.2%} differ; allowed: {self.mismatches:.2%}"
                continue
            distance = (have.double() - want.double()).abs().max() / want.double().abs().max().clamp(
                min=1e-30
            )
            # NaN, too, is not at most the tolerance.
            if not distance <= self.tolerance:
                return f"output {index} is off by {distance.item():.1e} of its largest; allowed: {self.tolerance:.1e}"
        return None


def load_cases(smoke: bool) -> list[Case]:
    """The cases of every module, in its order."""
    return [case for name in MODULES for case in importlib.import_module(name).cases(smoke)]
