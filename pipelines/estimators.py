"""Likelihood estimators: which states of a recorded trajectory are shown to the model again, and for which tokens.

A plug-in with one contract: (rollout, block layout, seed) to `SampleRows` whose noisy states carry targets, weights and
what the objective compares with, plus the cost in noisy rows. `slices` gives every estimator the same view of a
trajectory: per block, the steps at which its positions were written, counted from the block's first forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels.rows import NO_TARGET, SampleRows
from fewstep.platform.records import Trajectory

EXTRAS = ("old_logprob", "advantage")
SHARE = "share"
"""Extra of an estimator whose token log-probability is a weighted sum over several rows: the row's weight in it."""


@dataclass(frozen=True)
class Slices:
    """A trajectory laid out by blocks, from the block that holds the prompt's tail to the last.

    Attributes:
        tokens: int64 [S], clean tokens from the first generated block's start; positions: int64 [S].
        local_step: int64 [S], forwards the row's block had seen before the row was written; -1 for prompt rows and
            for positions never written, whose token is the mask in every state.
        chosen: bool [S], written by the model's own choice (not prompt, not end-of-sequence filling).
        logprob: float32 [S], recorded at commit; 0 where not chosen.
        num_rounds: the largest number of forwards any block took.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    local_step: NDArray[np.int64]
    chosen: NDArray[np.bool_]
    logprob: NDArray[np.float32]
    num_rounds: int


def slices(trajectory: Trajectory, block_size: int) -> Slices:
    """The blockwise view of a trajectory; its canvas must be whole (not aborted)."""
    num_prompt = len(trajectory.prompt_ids)
    tail = num_prompt % block_size
    start = num_prompt - tail
    tokens = np.concatenate((trajectory.prompt_ids[start:], trajectory.canvas_ids)).astype(np.int64)
    positions = np.arange(start, start + len(tokens), dtype=np.int64)
    step = np.concatenate((np.full(tail, -1), trajectory.step_map.astype(np.int64)))
    block = (positions - start) // block_size
    local = np.full(len(tokens), -1, np.int64)
    first_forward = 0
    for index in range(int(block[-1]) + 1):
        own = block == index
        local[own] = np.where(step[own] >= 0, step[own] - first_forward, -1)
        # The first forward of the next block follows the last one that wrote here (merged commit).
        first_forward = int(step[own].max()) + 1
    logprob = np.concatenate((np.full(tail, np.nan, np.float32), trajectory.logprob))
    chosen = ~np.isnan(logprob)
    return Slices(tokens, positions, local, chosen, np.where(chosen, logprob, 0.0), int(local.max()) + 1)


@dataclass(frozen=True)
class Terms:
    """What every row of one rollout shares: the model's block size and mask token, the loss weight of a target, and
    the rollout's advantage."""

    block_size: int
    mask_token: int
    weight: float
    advantage: float


class Estimator(Protocol):
    """Adds states of one rollout to `rows`; returns the noisy rows it cost.

    Attributes:
        extras: per-row floats that it fills in (`SampleRows.extras`).
        recorded: the engine recorded `old_logprob` on these very states; otherwise the trainer computes it, on the same
            rows, before a step's first update.
    """

    extras: tuple[str, ...]
    recorded: bool

    def add_states(
        self, rows: SampleRows, trajectory: Trajectory, terms: Terms, draws: np.random.Generator
    ) -> int: ...


class TrajectoryEstimator:
    """The states of the rollout themselves (TraceRL, 2509.06949, sliced over blocks).

    Round r masks, in every block, what was written at local step r·s or later and supervises what was written in the s
    steps from there: one noisy copy serves the r-th round of all blocks. s is TraceRL's shrinkage; from 2 on tokens are
    asked for from an earlier state than the engine wrote them from. At most `max_states` rounds are kept, drawn without
    replacement, and scaled up so that the sum over rounds stays unbiased.
    """

    extras: tuple[str, ...] = EXTRAS

    def __init__(self, max_states: int = 4, shrink: int = 1) -> None:
        self.max_states, self.shrink = max_states, shrink
        self.recorded = shrink == 1

    def add_states(
        self, rows: SampleRows, trajectory: Trajectory, terms: Terms, draws: np.random.Generator
    ) -> int:
        view = slices(trajectory, terms.block_size)
        num_rounds = -(-view.num_rounds // self.shrink)
        kept = min(self.max_states, num_rounds)
        scaled = replace(terms, weight=terms.weight * num_rounds / kept)
        rounds = [int(r) * self.shrink for r in draws.choice(num_rounds, kept, replace=False)]
        return sum(_transition(rows, view, first, first + self.shrink, scaled) for first in rounds)


class CompressedEstimator:
    """Compressed transitions of a good trajectory (dFactory's path distillation; Seed Diffusion eq. 9).

    From state i of every block the model is asked for all that was written later: the jumps that turn many
    steps into few. State 0, everything masked, is always shown; one later state is drawn.
    """

    extras: tuple[str, ...] = EXTRAS
    recorded = True  # of what its objective needs, which compares with nothing

    def add_states(
        self, rows: SampleRows, trajectory: Trajectory, terms: Terms, draws: np.random.Generator
    ) -> int:
        view = slices(trajectory, terms.block_size)
        starts = [0] if view.num_rounds == 1 else [0, int(draws.integers(1, view.num_rounds))]
        return sum(_transition(rows, view, start, view.num_rounds, terms) for start in starts)


class CoupledEstimator:
    """Coupled masks (coupled-GRPO, DiffuCoder, 2506.20639, section 4).

    The answer is shown with everything masked, then under `pairs` random masks M of rate r ~ U(low, high) and their
    complements, so that every token is asked for once in each pair, in some context. A token's log-probability is

        1/2 log p(all masked) + 1/2 mean over pairs of w log p(the state that masks it),   w = 1/r in M, 1/(1-r) outside

    and the factors travel as `share`. The loss weight lies on the rows of the first state.
    """

    extras: tuple[str, ...] = (*EXTRAS, SHARE)
    recorded = False

    def __init__(self, pairs: int = 1, low: float = 0.2, high: float = 0.8) -> None:
        self.pairs, self.low, self.high = pairs, low, high

    def add_states(
        self, rows: SampleRows, trajectory: Trajectory, terms: Terms, draws: np.random.Generator
    ) -> int:
        view = slices(trajectory, terms.block_size)
        written = view.local_step >= 0
        cost = _add(rows, view, written, written & view.chosen, terms, share=0.5)
        following = replace(terms, weight=0.0)
        for _ in range(self.pairs):
            rate = float(draws.uniform(self.low, self.high))
            chosen = draws.random(len(written)) < rate
            for masked, share in ((written & chosen, 1.0 / rate), (written & ~chosen, 1.0 / (1.0 - rate))):
                cost += _add(
                    rows, view, masked, masked & view.chosen, following, share=0.5 * share / self.pairs
                )
        return cost


def _transition(rows: SampleRows, view: Slices, first: int, last: int, terms: Terms) -> int:
    """One noisy copy: rows written at local step >= first are masked, those in [first, last) are targets."""
    masked = view.local_step >= first
    return _add(rows, view, masked, masked & (view.local_step < last) & view.chosen, terms)


def _add(
    rows: SampleRows,
    view: Slices,
    masked: NDArray[np.bool_],
    target: NDArray[np.bool_],
    terms: Terms,
    share: float = 1.0,
) -> int:
    """One noisy copy of the blocks that hold a target."""
    keep = _blocks_with(target, view.positions, terms.block_size)
    if not keep.any():
        return 0
    values = {
        "old_logprob": view.logprob,
        "advantage": np.where(target, terms.advantage, 0.0).astype(np.float32),
        SHARE: np.where(target, share, 0.0).astype(np.float32),
    }
    rows.add_state(
        tokens=np.where(masked, terms.mask_token, view.tokens)[keep],
        positions=view.positions[keep],
        targets=np.where(target, view.tokens, NO_TARGET)[keep],
        weights=np.where(target, terms.weight, 0.0).astype(np.float32)[keep],
        **{name: values[name][keep] for name in rows.extras},
    )
    return int(keep.sum())


def _blocks_with(
    target: NDArray[np.bool_], positions: NDArray[np.int64], block_size: int
) -> NDArray[np.bool_]:
    """Rows of blocks that hold a target; blocks that were already finished need no noisy copy."""
    block = (positions - positions[0]) // block_size
    return np.isin(block, np.unique(block[target]))


def clean_rows(trajectory: Trajectory, extras: tuple[str, ...] = EXTRAS) -> SampleRows:
    """Copy 0 of a rollout: prompt and canvas as they ended."""
    tokens = np.concatenate((trajectory.prompt_ids, trajectory.canvas_ids)).astype(np.int64)
    return SampleRows.clean(tokens, extras)
