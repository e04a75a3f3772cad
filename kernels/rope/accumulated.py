"""Rotary embedding on the CPU without temporaries, for inference."""

from __future__ import annotations

import torch


def apply_rope_accumulated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`apply_rope` with every product written or added where the result goes; x is left alone. No gradient.

    Six temporaries of the reference are fresh memory each: 977 us against 341 us at [512, 12, 64] fp32, one thread;
    equal at [16, 4, 32]. bf16 is widened once, torch's operations on two types take long: 269 us against 161 us at
    [256, 12, 64].
    """
    if x.dtype != cos.dtype:
        return apply_rope_accumulated(x.to(cos.dtype), cos, sin).to(x.dtype)
    width = cos.shape[-1]
    out = torch.empty_like(x)
    first, second = x[..., :width], x[..., width : 2 * width]
    torch.mul(first, cos, out=out[..., :width]).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=out[..., width : 2 * width]).addcmul_(first, sin)
    if 2 * width < x.shape[-1]:
        out[..., 2 * width :] = x[..., 2 * width :]
    return out
