"""The terms that policy-gradient objectives are made of. Tensors are [m], one entry a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fewstep.platform.errors import ConfigError

MAX_LOG_RATIO = 10.0
"""Log-ratios are clamped to ±this (TraceRL's code)."""

FLAT = 1e-6
"""Spread of a group's rewards up to which they teach nothing."""

KlForm = Literal["k2", "k3"]


def clipped_surrogate(
    log_ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(ρA, clip(ρ, 1 - low, 1 + high)A) with ρ = e^log_ratio, and where ρ lies outside the clip (bool).

    A `high` above `low` lets unlikely right tokens grow (asymmetric clip; DAPO, 2503.14476, section 3.1).
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1.0 - low, 1.0 + high)
    return torch.minimum(ratio * advantage, clipped * advantage), (ratio - clipped).abs() > 0


def kl_penalty(logprob: torch.Tensor, reference: torch.Tensor, form: KlForm) -> torch.Tensor:
    """An estimate of KL[π_θ ‖ π_ref] a token, from the two log-probabilities of the same token in the same state
    (Schulman, "Approximating KL divergence", 2020):

        k2 = (log π_θ - log π_ref)² / 2,   k3 = π_ref/π_θ - 1 - log(π_ref/π_θ)
    """
    if form == "k2":
        return (logprob - reference).square() / 2.0
    difference = (reference - logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - 1.0 - difference


def mismatch_weight(old: torch.Tensor, rollout: torch.Tensor, bound: float) -> torch.Tensor:
    """min(π_trainer/π_engine, bound), a constant: what the engine's arithmetic made likelier than the trainer's counts
    less (truncated importance sampling)."""
    return (old - rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=bound).detach()


@dataclass(frozen=True)
class Penalty:
    """KL to the frozen reference: β and the form; β = 0 needs no reference.

    Raises:
        ConfigError: an unknown form.
    """

    beta: float
    form: KlForm

    def __post_init__(self) -> None:
        if self.form not in ("k2", "k3"):
            raise ConfigError("objective_options.kl_form", self.form, "k2 or k3", "use one of them")

    def of(
        self, logprob: torch.Tensor, extras: Mapping[str, torch.Tensor], weights: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """β Σ weight · KL, and the sum of KL for the curve."""
        if not self.beta:
            return logprob.new_zeros(()), {}
        kl = kl_penalty(logprob, extras["reference_logprob"], self.form)
        return self.beta * (weights * kl).sum(), {"kl_sum": kl.detach().sum()}
