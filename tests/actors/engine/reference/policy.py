"""What one position would write, and which positions a policy opens: the definitions, one position at a time.

Every function also says how far its decision is from falling the other way (`margin`), so that a comparison with
arithmetic that rounds differently can leave out the few cases in which rounding decides.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from fewstep.platform.records import DecodePolicy
from fewstep.platform.rng import derive_seed


@dataclass(frozen=True)
class Candidate:
    """What a position would write: token, its untempered log-probability, the distribution's entropy in nats."""

    token: int
    logprob: float
    entropy: float
    margin: float

    @property
    def confidence(self) -> float:
        return math.exp(self.logprob)


def sampling_weights(logits: torch.Tensor, policy: DecodePolicy) -> tuple[list[float], float]:
    """Unnormalised probabilities of a draw (temperature, then top-p), and how far top-p was from another cut."""
    weights = (logits.double() / policy.temperature).softmax(-1).tolist()
    mass, margin = 0.0, math.inf
    for token in sorted(range(len(weights)), key=lambda t: -weights[t]):
        mass, before = mass + weights[token], mass
        if policy.top_p < 1.0:
            margin = min(margin, abs(before - policy.top_p))
            if before >= policy.top_p:
                weights[token] = 0.0
    return weights, margin


def candidate(logits: torch.Tensor, policy: DecodePolicy, position: int, step: int) -> Candidate:
    """The candidate of one row of logits [V] at an absolute position; `step` counts deciding forwards."""
    logprobs = logits.double().log_softmax(-1).tolist()
    entropy = -sum(math.exp(value) * value for value in logprobs if value > -math.inf)
    if policy.temperature == 0:
        best, second = logits.topk(2).values.tolist()
        token = int(logits.argmax())
        return Candidate(token, logprobs[token], entropy, best - second)
    weights, margin = sampling_weights(logits, policy)
    reached = [mass / sum(weights) for mass in itertools.accumulate(weights)]
    uniform = ((derive_seed(policy.seed, position, step) >> 31) + 0.5) / 2**32
    token = next(t for t, mass in enumerate(reached) if mass > uniform)
    margin = min(margin, *(abs(mass - uniform) for mass in reached))
    return Candidate(token, logprobs[token], entropy, margin)


def opens(
    candidates: dict[int, Candidate], policy: DecodePolicy, last_chance: bool
) -> tuple[list[int], float]:
    """The masked positions that open, best first, and the margin of that choice; at least the best one opens."""
    if not candidates:
        return [], math.inf
    if policy.kind == "entropy_bound":
        score = {p: -c.entropy for p, c in candidates.items()}
    else:
        score = {p: c.confidence for p, c in candidates.items()}
    ranked = sorted(candidates, key=lambda p: (-score[p], p))
    if last_chance:
        return ranked, math.inf
    number, margin = num_open([score[p] for p in ranked], policy)
    if 0 < number < len(ranked):
        margin = min(margin, score[ranked[number - 1]] - score[ranked[number]])
    return ranked[:number], margin


def num_open(score: list[float], policy: DecodePolicy) -> tuple[int, float]:
    """How many of the best open; `score` falls: confidences, or negative entropies for `entropy_bound`."""
    if policy.kind == "static":
        return min(policy.tokens_per_step, len(score)), math.inf
    if policy.kind == "threshold":
        passing = [value >= policy.threshold for value in score]
        distance = [abs(value - policy.threshold) for value in score]
    elif policy.kind == "factor":
        values = [(n + 1) * (1 - value) for n, value in enumerate(score, start=1)]
        passing = [value < policy.factor for value in values]
        distance = [abs(value - policy.factor) for value in values]
    else:
        # All accepted entropies but the largest, which is the last: those before this one.
        before = [-value for value in itertools.accumulate([0.0, *score[:-1]])]
        passing = [value <= policy.entropy_bound for value in before]
        distance = [math.inf, *(abs(value - policy.entropy_bound) for value in before[1:])]
    largest = max((n for n, passes in enumerate(passing, start=1) if passes), default=0)
    return max(1, largest), min(distance)
