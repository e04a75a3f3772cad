"""Rotary position embedding, half-split layout (Su et al., 2104.09864, equation 34; Llama's arrangement)."""

from __future__ import annotations

import torch


def rope_table(head_dim: int, max_positions: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each float32 [max_positions, head_dim / 2]."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + D']) by its position's angle, D' the width of cos; pass on what is behind 2·D'."""
    width = cos.shape[-1]
    first, second, rest = x[..., :width], x[..., width : 2 * width], x[..., 2 * width :]
    parts = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in parts), rest), dim=-1)


def rope_and_write(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destination: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
) -> torch.Tensor:
    """Rotate k, store k and v where a row has a destination; arguments in `fewstep.kernels.rope.rope_and_write`."""
    k = apply_rope(k, cos[:, None], sin[:, None])
    write(k, v, destination, key_pages, value_pages)
    return k


def write(
    k: torch.Tensor,
    v: torch.Tensor,
    destination: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
) -> None:
    """Store the rows of k and v [R, K, D] that have a destination at that position of the flat pages."""
    rows = (destination >= 0).nonzero()[:, 0]
    if len(rows):
        positions = destination[rows]
        key_pages.flatten(0, 1).index_copy_(0, positions, k[rows])
        value_pages.flatten(0, 1).index_copy_(0, positions, v[rows])
