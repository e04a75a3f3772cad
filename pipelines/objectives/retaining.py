"""Retention beside any objective: on documents that are not refined on, the model stays what it was.

    loss = objective's loss on the rollouts + weight · mean over the documents' masked tokens of D

D is a KL to the frozen starting model in the form of its estimate (`kl_penalty`: k2 or k3 of the documents' own tokens), or
-log p, the loss of pre-training (PPO-ptx, InstructGPT, 2203.02155, eq. 2). Where the documents' answers are the starting
model's own samples the KL is taken on the states and tokens that model goes through, which is distillation of its
behaviour there (rehearsal on pseudo-items: Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal", 1995).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from fewstep.kernels.model.training import RowTensors
from fewstep.pipelines.objectives import OBJECTIVES
from fewstep.pipelines.objectives.policy_gradient import kl_penalty
from fewstep.platform.registry import resolve

RETAINED = "retained"
"""Extra of rows that says 1 where the row's target is a document's."""


class Retaining:
    """What the trainer minimises when a run retains; rows with `RETAINED` never reach the objective inside.

    Args:
        objective: name or dotted path of that objective; `options`: its keyword arguments.
        weight: of the retention loss.
        form: `k2`, `k3` or `nll`.
    """

    def __init__(
        self, objective: str, options: Mapping[str, Any], weight: float, form: Literal["k2", "k3", "nll"]
    ) -> None:
        self._objective = resolve("objective", objective, OBJECTIVES)(**options)
        self._weight, self._form = weight, form

    def loss(
        self, logprob: torch.Tensor, entropy: torch.Tensor, rows: RowTensors
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        kept = rows.extras[RETAINED] > 0
        own = ~kept
        loss, metrics = logprob.new_zeros(()), dict[str, torch.Tensor]()
        # A micro-batch of documents alone has nothing that an objective could take a mean of.
        if own.any() or not kept.any():
            loss, of_objective = self._objective.loss(logprob[own], entropy[own], _only(rows, own))
            metrics |= of_objective
        distance = self._distance(logprob[kept], rows, kept)
        retention = self._weight * (rows.weights[kept] * distance).sum()
        metrics |= {
            "retain_loss": retention.detach(),
            f"retain_{'nll' if self._form == 'nll' else 'kl'}_sum": distance.detach().sum(),
            "retain_targets": kept.sum(),
        }
        return loss + retention, metrics

    def _distance(self, logprob: torch.Tensor, rows: RowTensors, kept: torch.Tensor) -> torch.Tensor:
        if self._form == "nll":
            return -logprob
        return kl_penalty(logprob, rows.extras["reference_logprob"][kept], self._form)


def _only(rows: RowTensors, own: torch.Tensor) -> RowTensors:
    """The targets of `own`; the rows around them stay, as target_rows points into them."""
    return replace(
        rows, target_rows=rows.target_rows[own], targets=rows.targets[own], weights=rows.weights[own],
        extras={name: values[own] for name, values in rows.extras.items()},
    )  # fmt: skip
