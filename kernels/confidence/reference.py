"""From logits to committed tokens: draw, confidence, commit rule, end of sequence. Derivations in README.md.

Shape legend: M masked rows, V vocabulary, N sequences, B block size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


class RowStats(NamedTuple):
    """What one masked row would write.

    Attributes:
        token: int64 [M].
        confidence: float32 [M], untempered softmax probability of `token`.
        logprob: float32 [M], its logarithm; not finite when the row's logits are not usable.
    """

    token: torch.Tensor
    confidence: torch.Tensor
    logprob: torch.Tensor


def _mix64(value: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64, whose products wrap; >> is arithmetic, so the sign bits are cut off."""
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _MULTIPLIER_1
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _MULTIPLIER_2
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def keyed_uniform(seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """A number in (0, 1) that depends on its key only; the same hash as `platform.rng.derive_seed(...)`.

    Args:
        seed, position, step: int64, shapes that broadcast.
    Returns:
        float64: the hash's upper 32 bits plus one half, over 2**32.
    """
    state = _mix64(seed + _GOLDEN)
    state = _mix64(state + _GOLDEN + position)
    state = _mix64(state + _GOLDEN + step)
    return (((state >> 32) & 0xFFFFFFFF).double() + 0.5) * 2.0**-32


def _draw(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Inverse-CDF draw of a token per row, in vocabulary order; every argument [M] but logits [M, V]."""
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    weight = scaled.softmax(-1)
    # A row keeps its own path whatever its neighbours ask for, so that a batch draws what a single would.
    nucleus = (top_p < 1.0).nonzero()[:, 0]
    if nucleus.numel():
        ordered, index = weight[nucleus].sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        ordered = ordered * (before < top_p[nucleus, None])
        weight[nucleus] = torch.zeros_like(ordered).scatter_(-1, index, ordered)
    cumulative = weight.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    return (cumulative <= target).sum(-1).clamp_(max=logits.shape[-1] - 1)


def row_stats(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor | None
) -> RowStats:
    """Token, confidence and log-probability of every row.

    Args:
        logits: float [M, V]; entries that may not be written are -inf.
        temperature: float32 [M], 0 = argmax; top_p: float32 [M].
        uniform: float64 [M] in (0, 1), read where temperature > 0; None when no row samples.
    """
    best, token = logits.max(-1)
    normaliser = logits.logsumexp(-1)
    chosen = best
    if uniform is not None:
        sampled = (temperature > 0).nonzero()[:, 0]
        token[sampled] = _draw(logits[sampled], temperature[sampled], top_p[sampled], uniform[sampled])
        chosen = logits.gather(-1, token[:, None])[:, 0]
    logprob = (chosen - normaliser).float()
    return RowStats(token, logprob.exp(), logprob)


def commit(
    confidence: torch.Tensor, masked: torch.Tensor, threshold: torch.Tensor, at_least: torch.Tensor
) -> torch.Tensor:
    """Which masked positions are written now.

    Args:
        confidence: float32 [N, B], read where `masked`; masked: bool [N, B].
        threshold: float32 [N], every masked position at or above it opens (inf = none does).
        at_least: int64 [N], this many best ones open anyway; equal confidences open left to right.
    Returns:
        bool [N, B], a subset of `masked`.
    """
    # -1 ranks what is not masked behind every probability.
    ranked = torch.where(masked, confidence, -1.0)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return masked & ((ranked >= threshold[:, None]) | (rank < at_least[:, None]))


def first_true(flags: torch.Tensor, otherwise: int) -> torch.Tensor:
    """int64 [N]: index of the first True of each row of bool [N, B], `otherwise` where there is none."""
    index = torch.arange(flags.shape[1], device=flags.device).expand_as(flags)
    return torch.where(flags, index, otherwise).amin(-1)


def fill_after_eos(masked: torch.Tensor, first_eos: torch.Tensor) -> torch.Tensor:
    """bool [N, B]: the masked positions behind the first end of sequence, int64 [N]; nobody chooses them."""
    index = torch.arange(masked.shape[1], device=masked.device)
    return masked & (index > first_eos[:, None])
