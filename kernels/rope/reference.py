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
