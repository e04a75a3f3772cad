"""Rotary position embedding, half-split layout (Su et al., 2104.09864, equation 34; Llama's arrangement)."""

from __future__ import annotations

import torch


def rope_table(head_dim: int, max_positions: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each float32 [max_positions, head_dim / 2]."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + head_dim/2]) by its position's angle.

    Args:
        x: [N, R, heads, head_dim].
        cos, sin: [N, R, 1, head_dim / 2], already gathered by position.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_and_write(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destination: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
) -> torch.Tensor:
    """Rotated keys [R, K, D]; rows with a destination are stored in the pages, in place.

    Args:
        k, v: [R, K, D]; cos, sin: [R, head_dim / 2].
        destination: int64 [R], flat position (page · page_size + offset); -1 = not stored.
        key_pages, value_pages: [P, page_size, K, D].
    """
    k = apply_rope(k, cos[:, None], sin[:, None])
    rows = (destination >= 0).nonzero()[:, 0]
    where = destination[rows]
    key_pages.flatten(0, 1)[where] = k[rows]
    value_pages.flatten(0, 1)[where] = v[rows]
    return k
