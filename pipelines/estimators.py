"""Likelihood estimators: which states of a recorded trajectory are shown to the model again, and for which tokens.

A plug-in with one contract: (rollout, block layout, seed) to `SampleRows` whose noisy states carry targets and
the recorded log-probabilities, plus the cost in noisy rows. `slices` gives every estimator the same view of a
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
    """Adds states of one rollout to `rows`; returns the noisy rows it cost."""

    def add_states(
        self, rows: SampleRows, trajectory: Trajectory, terms: Terms, draws: np.random.Generator
    ) -> int: ...


class TrajectoryEstimator:
    """The states of the rollout themselves (TraceRL, 2509.06949, sliced over blocks).

    Round r masks, in every block, what was written at local step r or later and supervises what was written
    exactly then: one noisy copy serves the r-th step of all blocks. At most `max_states` rounds are kept, drawn
    without replacement, and scaled up so that the sum over rounds stays unbiased.
    """

    def __init__(self, max_states: int = 4) -> None:
        self.max_states = max_states

    def add_states(
        self, rows: SampleRows, trajectory: Trajectory, terms: Terms, draws: np.random.Generator
    ) -> int:
        view = slices(trajectory, terms.block_size)
        kept = min(self.max_states, view.num_rounds)
        scaled = replace(terms, weight=terms.weight * view.num_rounds / kept)
        rounds = [int(r) for r in draws.choice(view.num_rounds, kept, replace=False)]
        return sum(_add(rows, view, r, r + 1, scaled) for r in rounds)


class CompressedEstimator:
    """Compressed transitions of a good trajectory (dFactory's path distillation; Seed Diffusion eq. 9).

    From state i of every block the model is asked for all that was written later: the jumps that turn many
    steps into few. State 0, everything masked, is always shown; one later state is drawn.
    """

    def add_states(
        self, rows: SampleRows, trajectory: Trajectory, terms: Terms, draws: np.random.Generator
    ) -> int:
        view = slices(trajectory, terms.block_size)
        starts = [0] if view.num_rounds == 1 else [0, int(draws.integers(1, view.num_rounds))]
        return sum(_add(rows, view, start, view.num_rounds, terms) for start in starts)


def _add(rows: SampleRows, view: Slices, first: int, last: int, terms: Terms) -> int:
    """One noisy copy: rows written at local step >= first are masked, those in [first, last) are targets."""
    masked = view.local_step >= first
    target = masked & (view.local_step < last) & view.chosen
    keep = _blocks_with(target, view.positions, terms.block_size)
    if not keep.any():
        return 0
    weights = np.where(target, terms.weight, 0.0).astype(np.float32)
    extras: dict[str, NDArray[np.float32]] = {}
    if rows.extras:
        extras = {
            "old_logprob": view.logprob[keep],
            "advantage": np.where(target, terms.advantage, 0.0).astype(np.float32)[keep],
        }
    rows.add_state(
        tokens=np.where(masked, terms.mask_token, view.tokens)[keep],
        positions=view.positions[keep],
        targets=np.where(target, view.tokens, NO_TARGET)[keep],
        weights=weights[keep],
        **extras,
    )
    return int(keep.sum())


def _blocks_with(
    target: NDArray[np.bool_], positions: NDArray[np.int64], block_size: int
) -> NDArray[np.bool_]:
    """Rows of blocks that hold a target; blocks that were already finished need no noisy copy."""
    block = (positions - positions[0]) // block_size
    return np.isin(block, np.unique(block[target]))


def clean_rows(trajectory: Trajectory) -> SampleRows:
    """Copy 0 of a rollout: prompt and canvas as they ended."""
    tokens = np.concatenate((trajectory.prompt_ids, trajectory.canvas_ids)).astype(np.int64)
    return SampleRows.clean(tokens, EXTRAS)
