"""The commit rule of a whole batch: torch on the CPU, one Triton kernel on a GPU."""

from __future__ import annotations

from fewstep.kernels.confidence import reference
from fewstep.kernels.confidence.records import Candidates, CanvasBlock, Committed, PolicyTensors
from fewstep.kernels.launch import Implementation, implementation_for


def commit(
    canvas: CanvasBlock, candidates: Candidates, policy: PolicyTensors, *, impl: Implementation | None = None
) -> Committed:
    """Which masked positions are written now, which written ones are replaced, and what an end of sequence closes.

    Nothing is read back and no shape depends on the data, so a step with it can be a CUDA graph. Both implementations
    give the same bits.

    Args:
        impl: None = fused for CUDA tensors, else reference.
    Errors:
        ResourceError: fused was asked for where it cannot run.
    """
    if implementation_for("commit", impl, canvas.tokens) == "reference":
        return reference.commit(canvas, candidates, policy)
    from fewstep.kernels.confidence import fused

    return fused.commit(canvas, candidates, policy)
