"""TraceRL (2509.06949): clipped policy gradient on the rollout's own states.

    J = Σ weight · C(π_θ(o | state) / π_old(o | state), A) - β KL[π_θ ‖ π_ref]

The reward is the verifier's score, z-scored inside a group; groups that almost always or almost never pass teach nothing
and are left out. The value model of the paper is not here: all tokens of an answer share its advantage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fewstep.kernels.model.training import RowTensors
from fewstep.pipelines.estimators import Estimator, TrajectoryEstimator
from fewstep.pipelines.objectives.credit import Credit
from fewstep.pipelines.objectives.policy_gradient import (
    FLAT,
    KlForm,
    Penalty,
    clipped_surrogate,
    mismatch_weight,
)
from fewstep.platform.records import Rollout


class Trace:
    """Group-relative policy gradient with KL, filtering, asymmetric clip and mismatch correction.

    Args:
        clip_low, clip_high: ε of the ratio's clip to either side.
        kl: β; 0 = no reference model is kept.
        kl_form: `k2` or `k3`.
        min_pass_rate, max_pass_rate: groups that passed less or more often are left out.
        shrink: neighbouring steps that are merged; divides the cost of training.
        max_states: states per rollout that are trained on.
        mismatch_bound: tokens weigh min(π_trainer/π_engine, this); 0 = uncorrected.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl: float = 0.01,
        kl_form: KlForm = "k3",
        min_pass_rate: float = 0.2,
        max_pass_rate: float = 0.8,
        shrink: int = 1,
        max_states: int = 4,
        mismatch_bound: float = 0.0,
    ) -> None:
        self.clip_low, self.clip_high, self.penalty = clip_low, clip_high, Penalty(kl, kl_form)
        self.min_pass_rate, self.max_pass_rate = min_pass_rate, max_pass_rate
        self.shrink, self.max_states, self.mismatch_bound = shrink, max_states, mismatch_bound
        self.has_reference, self.corrects_mismatch = kl > 0.0, mismatch_bound > 0.0

    def estimator(self) -> Estimator:
        return TrajectoryEstimator(self.max_states, self.shrink)

    def credit(self, group: Sequence[Rollout], progress: float) -> list[Credit]:
        """z-scores of the verifier's scores; weight 0 for a whole group that is filtered."""
        rewards = [rollout.verdict.score for rollout in group]
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
        rate = sum(rollout.verdict.passed for rollout in group) / len(group)
        used = deviation > FLAT and self.min_pass_rate <= rate <= self.max_pass_rate
        return [
            Credit(rollout, reward, (reward - mean) / deviation if used else 0.0, float(used))
            for rollout, reward in zip(group, rewards, strict=True)
        ]

    def loss(
        self, logprob: torch.Tensor, entropy: torch.Tensor, rows: RowTensors
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        old, weights, metrics = rows.extras["old_logprob"], rows.weights, {}
        if "rollout_logprob" in rows.extras:
            correction = mismatch_weight(old, rows.extras["rollout_logprob"], self.mismatch_bound)
            weights = weights * correction
            metrics["correction_sum"] = correction.sum()
        surrogate, outside = clipped_surrogate(
            logprob - old, rows.extras["advantage"], self.clip_low, self.clip_high
        )
        penalty, of_penalty = self.penalty.of(logprob, rows.extras, rows.weights)
        return penalty - (weights * surrogate).sum(), {
            "clipped_sum": outside.float().sum().detach(),
            "mismatch_sum": (logprob - old).detach().abs().sum(),
            "entropy_sum": entropy.detach().sum(),
            **metrics,
            **of_penalty,
        }
