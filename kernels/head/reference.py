"""Masked-row head: gather, project, reduce to a few numbers a row; the logits never outlive a chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fewstep.kernels.confidence import RowStats, row_stats


def masked_logits(
    hidden: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, mask_token_id: int | None
) -> torch.Tensor:
    """Logits [m, V] of the given rows, float32 or wider; the mask token gets -inf, it is never an answer."""
    scores = F.linear(hidden.index_select(0, rows), weight)
    if mask_token_id is not None:
        scores[:, mask_token_id] = -torch.inf
    # A confidence of bfloat16 logits summed in bfloat16 would be good to two digits.
    return scores if scores.dtype.itemsize >= 4 else scores.float()


def head_confidence(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    mask_token_id: int | None,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor | None,
    entropy: bool,
    max_elements: int,
) -> RowStats:
    """See `fewstep.kernels.head.head_confidence`; `hidden` is final-normed."""
    size = max(1, max_elements // len(weight))
    if len(rows) <= size:
        logits = masked_logits(hidden, rows, weight, mask_token_id)
        return row_stats(logits, temperature, top_p, uniform, entropy)
    parts = [
        row_stats(
            masked_logits(hidden, rows[i : i + size], weight, mask_token_id),
            temperature[i : i + size],
            top_p[i : i + size],
            None if uniform is None else uniform[i : i + size],
            entropy,
        )
        for i in range(0, len(rows), size)
    ]
    token, confidence, logprob, entropies = zip(*parts, strict=True)
    return RowStats(
        torch.cat(token), torch.cat(confidence), torch.cat(logprob), torch.cat(entropies) if entropy else None
    )
