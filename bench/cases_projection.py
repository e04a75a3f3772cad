"""The cases of `cases_head.py` (head, loss, norm) as records that `gpu.py` runs."""

from __future__ import annotations

from dataclasses import dataclass

import cases_head
import torch
from cases import Case, Inputs, Outputs


@dataclass(frozen=True)
class ProjectionCase(Case):
    """A case of `cases_head`, whose inputs are one function from an implementation's name to its outputs."""

    dtype: torch.dtype = torch.float32

    def complaint(self, got: Outputs, expected: Outputs) -> str | None:
        if cases_head.agree(expected, got, self.dtype):
            return None
        return "fused and reference disagree"


def cases(smoke: bool) -> list[Case]:
    if smoke:
        sizes = (6, 40, 16, torch.float32, True)
        tiny = [
            cases_head.head_case(*sizes),
            cases_head.head_case(*sizes, draw=True),
            cases_head.loss_case(*sizes),
            cases_head.norm_case(5, 16, torch.float32, True),
        ]
        return [_adapted(case) for case in tiny]
    return [_adapted(case) for case in cases_head.cases(torch.device("cuda"))]


def _adapted(case: cases_head.Case) -> Case:
    def make(device: torch.device, _seed: int) -> Inputs:
        return (case.make(device),)

    def run(inputs: Inputs, impl: str) -> Outputs:
        return tuple(output for output in inputs[0](impl) if output is not None)

    return ProjectionCase(
        op=case.op.partition(" ")[0],
        name=case.label.removeprefix(case.op.partition(" ")[0]).strip(),
        settings={**case.shape, "dtype": str(case.dtype).removeprefix("torch.")},
        make=make,
        run=run,
        num_bytes=case.num_bytes,
        flop=case.flop,
        # One shape of each op is compiled: the middle one of the inference ops, where the rival has most to win.
        compiled=case.op in ("head_confidence", "rms_norm") and 512 in case.shape.values(),
        dtype=case.dtype,
    )
