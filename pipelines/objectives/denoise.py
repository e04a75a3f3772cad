"""The supervised objective of both curriculum stages (Seed Diffusion, 2508.02193, eq. 6): weighted cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewstep.kernels.model.training import RowTensors


class Denoise:
    """loss = -Σ weight · log p(target); the corruption set the weights (1/t for masks, 1 for edits)."""

    def loss(
        self, logprob: torch.Tensor, entropy: torch.Tensor, rows: RowTensors
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        loss = -(rows.weights * logprob).sum()
        return loss, {"nll_sum": -logprob.detach().sum(), "entropy_sum": entropy.detach().sum()}
