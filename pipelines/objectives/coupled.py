"""coupled-GRPO (DiffuCoder, 2506.20639): clipped policy gradient on complementary masks.

    log π(o_k) = 1/2 log p(o_k | all masked) + 1/2 w log p(o_k | the state of a pair that masks k)

under the same masks for the new, the old and the reference policy. Advantages are rewards less the group's mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fewstep.kernels.model.training import RowTensors
from fewstep.pipelines.estimators import SHARE, CoupledEstimator, Estimator
from fewstep.pipelines.objectives.credit import Credit
from fewstep.pipelines.objectives.policy_gradient import FLAT, KlForm, Penalty, clipped_surrogate
from fewstep.platform.records import Rollout


class Coupled:
    """Group-relative policy gradient whose log-probabilities come from coupled masks.

    Args:
        clip_low, clip_high: ε of the ratio's clip to either side.
        kl: β; 0 = no reference model is kept.
        kl_form: `k2` or `k3`.
        pairs: of masks a rollout.
    """

    corrects_mismatch = False

    def __init__(
        self,
        clip_low: float = 0.5,
        clip_high: float = 0.5,
        kl: float = 0.01,
        kl_form: KlForm = "k3",
        pairs: int = 1,
    ) -> None:
        self.clip_low, self.clip_high, self.penalty = clip_low, clip_high, Penalty(kl, kl_form)
        self.pairs, self.has_reference = pairs, kl > 0.0

    def estimator(self) -> Estimator:
        return CoupledEstimator(self.pairs)

    def credit(self, group: Sequence[Rollout], progress: float) -> list[Credit]:
        """Scores less their mean; a group of equal ones teaches nothing and weighs nothing."""
        rewards = [rollout.verdict.score for rollout in group]
        mean, used = sum(rewards) / len(rewards), max(rewards) - min(rewards) > FLAT
        return [
            Credit(rollout, reward, reward - mean, float(used))
            for rollout, reward in zip(group, rewards, strict=True)
        ]

    def loss(
        self, logprob: torch.Tensor, entropy: torch.Tensor, rows: RowTensors
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Row log-probabilities are added up to token log-probabilities first."""
        token, count = tokens_of(rows)

        def per_token(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(count).index_add(0, token, values)

        share = rows.extras[SHARE]
        new, old = per_token(share * logprob), per_token(share * rows.extras["old_logprob"])
        weights = per_token(rows.weights)
        # Equal in all rows of a token, so the mean is the value.
        advantage = per_token(rows.extras["advantage"]) / per_token(torch.ones_like(share))
        surrogate, outside = clipped_surrogate(new - old, advantage, self.clip_low, self.clip_high)
        frozen = {}
        if self.has_reference:
            frozen = {"reference_logprob": per_token(share * rows.extras["reference_logprob"])}
        penalty, of_penalty = self.penalty.of(new, frozen, weights)
        # Sums are divided by the targets, which are rows, and every token has several.
        rows_per_token = len(token) / max(1, count)
        per_answer_token = {"clipped_sum": outside.float().sum().detach(), **of_penalty}
        return penalty - (weights * surrogate).sum(), {
            "entropy_sum": entropy.detach().sum(),
            **{name: value * rows_per_token for name, value in per_answer_token.items()},
        }


def tokens_of(rows: RowTensors) -> tuple[torch.Tensor, int]:
    """int64 [m], the token that each target row is an estimate of (same sample, same position), counted from 0; and how
    many there are."""
    samples, positions = (
        rows.target_rows // rows.positions.shape[1],
        rows.positions.flatten()[rows.target_rows],
    )
    key = samples * (int(rows.positions.max()) + 1) + positions
    _, token = torch.unique(key, return_inverse=True)
    return token, int(token.max()) + 1 if len(token) else 0
