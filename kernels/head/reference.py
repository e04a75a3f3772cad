"""Masked-row head: gather, project, reduce to three numbers a row; the logits never outlive a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fewstep.kernels.confidence import RowStats, row_stats

# 2**22 fp32 logits are 16 MiB; a vocabulary of 420 fits 9,986 rows, one chunk for any batch of the tiny model.
MAX_CHUNK_ELEMENTS = 1 << 22


def head_statistics(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor | None,
    max_elements: int = MAX_CHUNK_ELEMENTS,
) -> RowStats:
    """Statistics of the rows that are still masked; every other row skips the head.

    Args:
        hidden: [R, d], final-normed; rows: int64 [M], indices into R.
        project: [m, d] to logits [m, V] (`Transformer.logits`).
        temperature, top_p: float32 [M]; uniform: float64 [M] or None (see `row_stats`).
        max_elements: logits held at a time; a chunk has at least one row.
    """
    size = max(1, max_elements // vocab_size)
    parts = [
        row_stats(
            project(hidden.index_select(0, rows[i : i + size])),
            temperature[i : i + size],
            top_p[i : i + size],
            None if uniform is None else uniform[i : i + size],
        )
        for i in range(0, len(rows), size)
    ]
    if len(parts) == 1:
        return parts[0]
    return RowStats(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class HeadStats(NamedTuple):
    """RowStats of the rows asked for, with their entropy in nats, float32 [M], if it was asked for."""

    token: torch.Tensor
    confidence: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor | None


def head_confidence(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    *,
    mask_token_id: int,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor | None,
    entropy: bool = False,
) -> HeadStats:
    """Statistics of `rows` of hidden [R, d] under the head weight [V, d]; other arguments as `head_statistics`."""

    def project(some: torch.Tensor) -> torch.Tensor:
        scores = F.linear(some, weight)
        scores[..., mask_token_id] = -torch.inf
        return scores

    stats = head_statistics(hidden, rows, project, weight.shape[0], temperature, top_p, uniform)
    nats = None
    if entropy:
        logprobs = project(hidden[rows]).float().log_softmax(-1)
        nats = -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0)).sum(-1)
    return HeadStats(*stats, nats)
