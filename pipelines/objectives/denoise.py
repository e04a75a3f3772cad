"""The supervised objective of both curriculum stages (Seed Diffusion, 2508.02193, eq. 6): weighted cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewstep.kernels.model.training import RowTensors

LEVELS = ("edit", "noise_25", "noise_50", "noise_75", "noise_100")
"""Edited states, then masked ones by their block's mask rate: up to 25 %, 50 %, 75 %, 100 %."""


class Denoise:
    """loss = -Σ weight · log p(target); the corruption set the weights (1/t for masks, 1 for edits).

    Rows with the extra `noise`, a mask rate or 0 for edits, are counted by level, too.
    """

    def loss(
        self, logprob: torch.Tensor, entropy: torch.Tensor, rows: RowTensors
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        loss = -(rows.weights * logprob).sum()
        nll = -logprob.detach()
        metrics = {"nll_sum": nll.sum(), "entropy_sum": entropy.detach().sum()}
        if (noise := rows.extras.get("noise")) is not None:
            level = (noise * (len(LEVELS) - 1)).ceil().long()
            sums = torch.zeros(len(LEVELS), dtype=nll.dtype).index_add_(0, level, nll)
            counts = torch.bincount(level, minlength=len(LEVELS))
            metrics |= {f"nll_sum_{name}": sums[number] for number, name in enumerate(LEVELS)}
            metrics |= {f"targets_{name}": counts[number] for number, name in enumerate(LEVELS)}
        return loss, metrics
