"""Cosines and sines of a model's positions, with what stretches them past the trained length."""

from __future__ import annotations

import math

import torch

from fewstep.kernels.model.config import ModelConfig, RopeScaling
from fewstep.kernels.rope import rope_table


def rotary_table(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each float32 [max_position_embeddings, rotary_dim / 2]."""
    if config.rope_scaling is None:
        return rope_table(config.rotary_dim, config.max_position_embeddings, config.rope_theta)
    frequency, scale = scaled_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)
    angle = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float64), frequency)
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def scaled_frequencies(dim: int, theta: float, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    """Radians per position, float64 [dim / 2], and the factor on both cosine and sine.

    Args:
        dim: rotated dimensions of a head; theta: the base.
    """
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if scaling.kind == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequency, scaling), 1.0
    return _yarn(frequency, dim, theta, scaling)


def _llama3(frequency: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Kept where the trained length holds more than `high_freq_factor` turns, divided below `low_freq_factor`."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def _yarn(
    frequency: torch.Tensor, dim: int, theta: float, scaling: RopeScaling
) -> tuple[torch.Tensor, float]:
    """Divided where the trained length holds fewer than `beta_slow` turns, kept above `beta_fast`; a ramp over the
    dimension's index between the two (2309.00071, equations 20 to 22)."""

    def index_of(turns: float) -> float:
        trained = scaling.original_max_position_embeddings
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(index_of(scaling.beta_fast)), 0)
    last = min(math.ceil(index_of(scaling.beta_slow)), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float64)
    divided = ((index - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
    scale = scaling.attention_factor
    if scale is None:
        scale = 0.1 * math.log(scaling.factor) + 1.0
    return frequency * (1.0 - divided + divided / scaling.factor), scale
