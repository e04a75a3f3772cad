"""Answers as a simulator needs them: how many blocks, and how many forwards each of them took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fewstep.cluster.plan.settings import PolicyProfile, Workload


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        prompt_tokens: of its prompt; shared_tokens: those of them that somebody else has cached.
        steps: forwards of each of its blocks; the first one begins with the prompt's tail.
        num_tokens: committed tokens that count.
        block_size: of the model; a block is the unit of caching.
    """

    prompt_tokens: int
    shared_tokens: int
    steps: tuple[int, ...]
    num_tokens: int
    block_size: int


class AnswerSource(Protocol):
    """Where simulated answers come from."""

    def draw(self, random: np.random.Generator) -> Answer:
        """One answer."""


@dataclass(frozen=True)
class MeasuredAnswers:
    """Answers that an engine gave; drawn with equal chance."""

    answers: Sequence[Answer]

    def draw(self, random: np.random.Generator) -> Answer:
        return self.answers[int(random.integers(len(self.answers)))]


@dataclass(frozen=True)
class ProfiledAnswers:
    """Answers with a workload's lengths and a profile's tokens per forward.

    A block of b tokens takes b / TPF forwards in the mean: one, and binomially many of the b - 1 others.
    """

    workload: Workload
    profile: PolicyProfile

    def draw(self, random: np.random.Generator) -> Answer:
        workload, size = self.workload, self.profile.block_size
        num_tokens = max(1, round(self._length(random)))
        end = workload.prompt_tokens % size + num_tokens
        num_blocks = -(-end // size)
        mean = max(1.0, size / self.profile.tokens_per_forward)
        share = (mean - 1.0) / (size - 1) if size > 1 else 0.0
        steps = 1 + random.binomial(size - 1, min(1.0, share), size=num_blocks)
        shared = workload.shared_prompt_tokens // size * size
        return Answer(workload.prompt_tokens, shared, tuple(int(n) for n in steps), num_tokens, size)

    def _length(self, random: np.random.Generator) -> float:
        mean, spread = float(self.workload.answer_tokens), self.workload.answer_spread
        if spread == 0.0:
            return mean
        shape = 1.0 / spread**2
        return float(random.gamma(shape, mean / shape))


@dataclass(frozen=True)
class MixedAnswers:
    """Answers of several kinds; `shares` add up to 1."""

    sources: Sequence[AnswerSource]
    shares: Sequence[float]

    def draw(self, random: np.random.Generator) -> Answer:
        kind = int(random.choice(len(self.sources), p=list(self.shares)))
        return self.sources[kind].draw(random)
