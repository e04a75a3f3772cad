"""Self-distillation on verified few-step trajectories (constrained order, Seed Diffusion eq. 9; dFactory; dParallel).

Of every group the right answers that took the fewest forwards are kept, and the model is asked for their tokens
from the states of that path: from everything masked, and from one later state. Targets are the model's own
tokens, so the loss sharpens the mode it already reaches fastest; wrong answers never train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fewstep.kernels.model.training import RowTensors
from fewstep.pipelines.estimators import CompressedEstimator, Estimator
from fewstep.pipelines.objectives.credit import Credit
from fewstep.platform.records import Rollout


class Distill:
    """Cross-entropy on compressed transitions of the best rollouts, with a certainty term.

    Args:
        keep: rollouts kept per group.
        certainty: weight β of the entropy on target rows (certainty forcing, 2509.26488).
    """

    def __init__(self, keep: int = 1, certainty: float = 0.1) -> None:
        self.keep, self.certainty = keep, certainty

    def estimator(self) -> Estimator:
        return CompressedEstimator()

    def credit(self, group: Sequence[Rollout], progress: float) -> list[Credit]:
        """The `keep` verified rollouts with the fewest forwards get weight 1; ties go to the likelier one."""

        def rank(rollout: Rollout) -> tuple[int, float]:
            trajectory = rollout.trajectory
            return trajectory.forwards, -float(np.nanmean(trajectory.logprob))

        passed = sorted((rollout for rollout in group if rollout.verdict.passed), key=rank)
        best = {id(rollout) for rollout in passed[: self.keep]}
        return [
            Credit(rollout, float(rollout.verdict.passed), 0.0, float(id(rollout) in best))
            for rollout in group
        ]

    def loss(
        self, logprob: torch.Tensor, entropy: torch.Tensor, rows: RowTensors
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        nll, uncertainty = -(rows.weights * logprob).sum(), (rows.weights * entropy).sum()
        return nll + self.certainty * uncertainty, {
            "nll_sum": -logprob.detach().sum(),
            "entropy_sum": entropy.detach().sum(),
        }
