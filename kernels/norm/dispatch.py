"""RMSNorm: torch's op or a widened one on the CPU, one Triton pass on a GPU."""

from __future__ import annotations

from typing import Literal

import torch

from fewstep.kernels.launch import implementation_for
from fewstep.kernels.norm import reference
from fewstep.kernels.norm.widened import rms_norm_widened

NormImplementation = Literal["reference", "widened", "fused"]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, impl: NormImplementation | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in float32 and rounded once; differentiable.

    Args:
        x: [..., d]; weight: [d]. The result has x's type.
        impl: None = fused for CUDA tensors; else widened for bfloat16 without a gradient, else reference.
    Errors:
        ResourceError: fused was asked for where it cannot run.
    """
    chosen = implementation_for("rms_norm", impl, x)
    if chosen == "widened" or (impl is None and chosen == "reference" and _narrow(x)):
        return rms_norm_widened(x, weight, eps)
    if chosen == "reference":
        return reference.rms_norm(x, weight, eps)
    from fewstep.kernels.norm import fused

    return fused.rms_norm(x, weight, eps)


def _narrow(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
