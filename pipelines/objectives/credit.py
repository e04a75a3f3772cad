"""What an objective says of rollouts before any gradient: which of them train, and with what advantage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fewstep.actors.trainer_rank import Objective
from fewstep.pipelines.estimators import Estimator
from fewstep.platform.records import Rollout


@dataclass(frozen=True)
class Credit:
    """One rollout's part in the update. `reward` is what is logged; a zero weight leaves the rollout out."""

    rollout: Rollout
    reward: float
    advantage: float
    weight: float


class RefineObjective(Objective, Protocol):
    """The two halves of an on-policy objective.

    `credit` runs on the driver: one group of rollouts of one prompt in, their credits out; `progress` is the share
    of the run that lies behind. `loss` runs in the trainer (`actors/trainer_rank.py: Objective`). `estimator` names the
    states the loss is evaluated on.

    Two attributes ask the trainer for more, and may be absent: `has_reference` for `reference_logprob` in the rows'
    extras, of the model that refinement started from on the same states; `corrects_mismatch` for `old_logprob` from the
    trainer before the step's first update, and the engine's as `rollout_logprob`.
    """

    def estimator(self) -> Estimator: ...

    def credit(self, group: Sequence[Rollout], progress: float) -> list[Credit]: ...


def _tokens_per_step(rollout: Rollout) -> NDArray[np.int64]:
    """int64 [K], positions written by each of the trajectory's K forwards (what counts for the edit distance:
    with masks as a symbol and no insertions, the distance of two states is the number of positions between)."""
    steps = rollout.trajectory.step_map
    return np.bincount(steps[steps >= 0].astype(np.int64), minlength=rollout.trajectory.forwards)


def adjacent_surrogate(rollout: Rollout) -> float:
    """L · mean over steps of 1 / d(τ[k], τ[k-1]): K for even steps (method: S_adj = K / L), more for uneven ones."""
    opened = _tokens_per_step(rollout)
    opened = opened[opened > 0]
    return float(opened.sum() * np.mean(1.0 / opened))


def pairwise_surrogate(rollout: Rollout) -> float:
    """L · mean over state pairs of 1 / d(τ[i], τ[j]) (Seed Diffusion, 2508.02193, eq. 11), about 2 ln K.

    Pairs at distance 0 are left out. The factor L makes answers of different length comparable.
    """
    opened = _tokens_per_step(rollout)
    state = np.concatenate(([0], np.cumsum(opened)))
    distance = np.abs(state[:, None] - state[None, :])[np.triu_indices(len(state), k=1)]
    distance = distance[distance > 0]
    return float(opened.sum() * np.mean(1.0 / distance))
