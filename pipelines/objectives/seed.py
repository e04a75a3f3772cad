"""The on-policy objective of Seed Diffusion (2508.02193, eq. 10 and 11), made stable.

    R = V · (1 + w · (c_max - c) / (c_max - c_min)),   A = R - mean of the group

V is the verifier's verdict, c the edit-distance surrogate of the trajectory's length inside the group, w rises
linearly over the first part of training. Speed pays only where the answer is right: an additive reward collapses
to opening everything at once (2512.09106). The gradient is the clipped ratio on the recorded steps (TraceRL).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from fewstep.kernels.model.training import RowTensors
from fewstep.pipelines.estimators import Estimator, TrajectoryEstimator
from fewstep.pipelines.objectives.credit import Credit, adjacent_surrogate, pairwise_surrogate
from fewstep.pipelines.objectives.policy_gradient import FLAT, KlForm, Penalty, clipped_surrogate
from fewstep.platform.errors import ConfigError
from fewstep.platform.records import Rollout

_SURROGATES = {"pairwise": pairwise_surrogate, "adjacent": adjacent_surrogate}


class Seed:
    """Clipped policy gradient with a verifier-gated, progressive speed reward.

    Args:
        speed_weight: final w.
        ramp: share of training over which w rises from 0.
        surrogate: `pairwise` (eq. 11, logarithmic in the steps) or `adjacent` (linear).
        clip: ε of the ratio's clip; 0.2 is usual.
        max_states: recorded states per rollout that are trained on.
        gating: `multiplicative` as above; `additive` pays speed to wrong answers, too, and is there to be compared with.
        kl: β of the KL to the model that refinement started from; 0 = none is kept.
        kl_form: `k2` or `k3`.
    """

    corrects_mismatch = False

    def __init__(
        self,
        speed_weight: float = 1.0,
        ramp: float = 0.2,
        surrogate: Literal["pairwise", "adjacent"] = "pairwise",
        clip: float = 0.2,
        max_states: int = 4,
        gating: Literal["multiplicative", "additive"] = "multiplicative",
        kl: float = 0.0,
        kl_form: KlForm = "k3",
    ) -> None:
        self.penalty, self.has_reference = Penalty(kl, kl_form), kl > 0.0
        self.speed_weight, self.ramp, self.clip, self.max_states = speed_weight, ramp, clip, max_states
        if gating not in ("multiplicative", "additive"):
            raise ConfigError(
                "objective_options.gating", gating, "multiplicative or additive", "use one of them"
            )
        self.gating = gating
        self._surrogate = _SURROGATES[surrogate]

    def estimator(self) -> Estimator:
        return TrajectoryEstimator(self.max_states)

    def credit(self, group: Sequence[Rollout], progress: float) -> list[Credit]:
        """Group-relative advantages; a group whose rewards are all equal teaches nothing and weighs nothing."""
        speed_weight = self.speed_weight * min(1.0, progress / self.ramp if self.ramp else 1.0)
        costs = [self._surrogate(rollout) for rollout in group]
        low, high = min(costs), max(costs)
        rewards = [
            self._reward(float(rollout.verdict.passed), speed_weight * (high - cost) / (high - low or 1.0))
            for rollout, cost in zip(group, costs, strict=True)
        ]
        mean = sum(rewards) / len(rewards)
        flat = max(rewards) - min(rewards) <= FLAT
        return [
            Credit(rollout, reward, reward - mean, 0.0 if flat else 1.0)
            for rollout, reward in zip(group, rewards, strict=True)
        ]

    def _reward(self, passed: float, speed: float) -> float:
        return passed * (1.0 + speed) if self.gating == "multiplicative" else passed + speed

    def loss(
        self, logprob: torch.Tensor, entropy: torch.Tensor, rows: RowTensors
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        advantage = rows.extras["advantage"]
        log_ratio = logprob - rows.extras["old_logprob"]
        surrogate, outside = clipped_surrogate(log_ratio, advantage, self.clip, self.clip)
        penalty, of_penalty = self.penalty.of(logprob, rows.extras, rows.weights)
        loss = penalty - (rows.weights * surrogate).sum()
        return loss, {
            "clipped_sum": outside.float().sum().detach(),
            "mismatch_sum": log_ratio.detach().abs().sum(),
            "entropy_sum": entropy.detach().sum(),
            **of_penalty,
        }
