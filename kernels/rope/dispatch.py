"""Rotary embedding, and the cache write that goes with it: torch on the CPU, one Triton pass on a GPU.

Shape legend: R rows, H heads, K key/value heads, D head dimension, D' pairs that are rotated, P pages, s positions a page.
"""

from __future__ import annotations

from typing import Literal

import torch

from fewstep.kernels.launch import implementation_for
from fewstep.kernels.rope import reference
from fewstep.kernels.rope.accumulated import apply_rope_accumulated

RopeImplementation = Literal["reference", "accumulated", "fused"]


def apply_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: RopeImplementation | None = None
) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + D']) by its position's angle; differentiable.

    Args:
        x: [..., H, D]; components from 2·D' on pass through.
        cos, sin: [..., 1, D'], D' <= D / 2, gathered by position. The products have the wider type of the two, the
            result x's.
        impl: None = fused for CUDA tensors; else accumulated for fp32 and bf16 without a gradient, else
            reference.
    Errors:
        ResourceError: fused was asked for where it cannot run.
    """
    chosen = implementation_for("apply_rope", impl, x)
    if chosen == "accumulated" or (impl is None and chosen == "reference" and _overwritable(x, cos)):
        return apply_rope_accumulated(x, cos, sin)
    if chosen == "reference":
        return reference.apply_rope(x, cos, sin)
    from fewstep.kernels.rope import fused

    return fused.apply_rope(x, cos, sin)


def rope_and_write(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destination: torch.Tensor | None,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    *,
    impl: RopeImplementation | None = None,
) -> torch.Tensor:
    """Rotate the keys of a forward and store those that became final, with their values, in the pages.

    Args:
        k, v: [R, K, D]; cos, sin: [R, D'], see `apply_rope`.
        destination: int64 [R], where a row goes: page · s + offset; negative = nowhere. No two rows share one. None =
            no row goes anywhere, which the caller often knows.
        key_pages, value_pages: [P, s, K, D] contiguous, of the type of k, written in place.
        impl: as for `apply_rope`.
    Returns:
        Rotated k, [R, K, D]. No gradient.
    Errors:
        ResourceError: fused was asked for where it cannot run.
    """
    if implementation_for("rope_and_write", impl, k) == "fused":
        from fewstep.kernels.rope import fused

        return fused.rope_and_write(k, v, cos, sin, destination, key_pages, value_pages)
    k = apply_rope(k, cos[:, None], sin[:, None], impl)
    if destination is not None:
        reference.write(k, v, destination, key_pages, value_pages)
    return k


def _overwritable(x: torch.Tensor, cos: torch.Tensor) -> bool:
    # A compiler fuses the reference itself, and fails on results written into views.
    narrow = x.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()
    return narrow and cos.dtype == torch.float32 and not (torch.is_grad_enabled() and x.requires_grad)
