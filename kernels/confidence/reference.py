"""From logits to committed tokens: draw, confidence, commit rule, end of sequence. Derivations in README.md.

Shape legend: M masked rows, V vocabulary, N sequences, B block size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fewstep.kernels.confidence.records import (
    NEVER,
    POLICY_KINDS,
    Candidates,
    CanvasBlock,
    Committed,
    PolicyTensors,
)

# Units of entropy in a nat, see `entropy_units`.
ENTROPY_UNITS = 2.0**40

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


class RowStats(NamedTuple):
    """What one masked row would write.

    Attributes:
        token: int64 [M].
        confidence: float32 [M], untempered softmax probability of `token`.
        logprob: float32 [M], its logarithm; not finite when the row's logits are not usable.
        entropy: float32 [M] in nats, of the untempered softmax; None unless it was asked for.
    """

    token: torch.Tensor
    confidence: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor | None = None


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
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor | None,
    entropy: bool = False,
) -> RowStats:
    """Token, confidence and log-probability of every row, and its entropy if asked for.

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
    # entr is -p·log p with 0 at p = 0, so a forbidden token adds nothing where p·log p would be NaN.
    spread = torch.special.entr(logits.softmax(-1)).sum(-1).float() if entropy else None
    return RowStats(token, logprob.exp(), logprob, spread)


def commit(canvas: CanvasBlock, candidates: Candidates, policy: PolicyTensors) -> Committed:
    """The rule in torch, for any device; see `fewstep.kernels.confidence.commit`."""
    masked = canvas.masked
    opened = _opened(masked, candidates, policy)
    edited = canvas.generated & ~masked & (candidates.token != canvas.tokens)
    edited &= (candidates.confidence > policy.edit_threshold[:, None]) & policy.allow_edit[:, None]
    tokens = torch.where(opened | edited, candidates.token, canvas.tokens)
    is_end = canvas.generated & (tokens[:, :, None] == canvas.ends[:, None]).any(-1)
    first_end = first_true(is_end, NEVER)
    left = masked & ~opened
    filled = fill_after_eos(left, first_end)
    tokens = torch.where(filled, canvas.eos_token_id, tokens)
    first_mask = first_true(left & ~filled, masked.shape[1])
    return Committed(tokens, opened, edited, filled, first_mask, first_end)


def _opened(masked: torch.Tensor, candidates: Candidates, policy: PolicyTensors) -> torch.Tensor:
    """bool [N, B], a subset of `masked`: what each sequence's own rule opens."""
    confidence, kind, number = candidates.confidence, policy.kind[:, None], policy.number[:, None]
    by_entropy = kind == POLICY_KINDS["entropy_bound"]
    key, entropy = confidence, candidates.entropy
    if entropy is not None:
        # 0 - x and not -x: a sort may tell -0 from 0, a comparison does not.
        key = torch.where(by_entropy, 0.0 - entropy, confidence)
    # What is not masked, and what is not a number, comes behind every candidate. B comparisons for each position
    # would need no sort, but take 115 us against the sort's 22 us (N = 64, B = 32, one thread).
    key = torch.where(masked & ~key.isnan(), key, -torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    open_now = (kind == POLICY_KINDS["threshold"]) & (confidence >= number)
    open_now |= (kind == POLICY_KINDS["factor"]) & ((rank + 2).float() * (1.0 - confidence) < number)
    if entropy is not None:
        units = entropy_units(entropy)
        sorted_units = units.gather(-1, order)
        before = torch.empty_like(units).scatter_(-1, order, sorted_units.cumsum(-1) - sorted_units)
        open_now |= by_entropy & (before.double() <= number.double() * ENTROPY_UNITS)
    return masked & (open_now | (rank < policy.at_least[:, None]))


def entropy_units(entropy: torch.Tensor) -> torch.Tensor:
    """Nats as int64 multiples of 2**-40: integers add to the same sum in any order, so every device opens the same.

    Less than 0 (rounding) counts as 0, more than 1,024 or no number as 1,024; 256 of them stay far below 2**63.
    """
    bounded = torch.where(entropy <= 1024.0, entropy, 1024.0).clamp(min=0.0)
    return (bounded.double() * ENTROPY_UNITS).long()


def first_true(flags: torch.Tensor, otherwise: int) -> torch.Tensor:
    """int64 [N]: index of the first True of each row of bool [N, B], `otherwise` where there is none."""
    index = torch.arange(flags.shape[1], device=flags.device).expand_as(flags)
    return torch.where(flags, index, otherwise).amin(-1)


def fill_after_eos(masked: torch.Tensor, first_eos: torch.Tensor) -> torch.Tensor:
    """bool [N, B]: the masked positions behind the first end of sequence, int64 [N]; nobody chooses them."""
    index = torch.arange(masked.shape[1], device=masked.device)
    return masked & (index > first_eos[:, None])
