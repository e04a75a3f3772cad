"""One entry to the masked-row head, whatever runs it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from fewstep.kernels.confidence import RowStats
from fewstep.kernels.head import reference, tiled
from fewstep.kernels.launch import implementation_for
from fewstep.kernels.linear import PackedWeight

# 2**22 fp32 logits are 16 MiB; a vocabulary of 420 fits 9,986 rows, one chunk for any batch of the tiny model.
MAX_CHUNK_ELEMENTS = 1 << 22


def head_confidence(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    *,
    mask_token_id: int | None,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    entropy: bool = False,
    nucleus: bool | None = None,
    max_elements: int = MAX_CHUNK_ELEMENTS,
    packed: list[PackedWeight] | None = None,
    impl: Literal["reference", "tiled", "fused"] | None = None,
) -> RowStats:
    """Token, confidence, log-probability and entropy of the rows that are still masked; others skip the head.

    Args:
        hidden: [R, d], final-normed unless `norm_weight` is given; rows: int64 [M], indices into R.
        weight: [V, d], hidden's type; mask_token_id: the column that gets -inf, None = no column.
        temperature, top_p: float32 [M]; uniform: float64 [M] in (0, 1) or None when no row samples (see `row_stats`).
        norm_weight: [d], applies RMSNorm(`norm_eps`) to the gathered rows before the head.
        entropy: fill in `RowStats.entropy`.
        nucleus: whether some row has top_p < 1, if the caller knows; None looks at `top_p`, for which a GPU must be
            waited for. Such rows take the reference's way (they need a sort).
        max_elements: logits the reference holds at a time; a chunk has at least one row.
        packed: the weight's tiles as `pack_head` makes them, for `tiled`, which then always pays.
        impl: None = fused for CUDA tensors; on the CPU tiled where it pays (`tiled.pays`), else reference.
    Errors:
        ResourceError: fused was asked for where it cannot run.
    """
    chosen = implementation_for("head_confidence", impl, hidden)
    if impl is None and chosen == "reference" and (packed is not None or tiled.pays(len(rows), len(weight))):
        chosen = "tiled"
    if norm_weight is not None:
        if chosen == "fused":
            from fewstep.kernels.norm import fused as norm

            hidden = norm.rms_norm_rows(hidden, rows, norm_weight, norm_eps)
        else:
            hidden = F.rms_norm(hidden.index_select(0, rows), norm_weight.shape, norm_weight, norm_eps)
        rows = torch.arange(len(rows), device=rows.device)
    if chosen == "reference":
        return reference.head_confidence(
            hidden, rows, weight, mask_token_id, temperature, top_p, uniform, entropy, max_elements
        )
    if chosen == "tiled":
        stats = tiled.head_confidence(
            hidden, rows, weight, mask_token_id, temperature, uniform, entropy, packed
        )
    else:
        from fewstep.kernels.head import fused

        stats = fused.head_confidence(hidden, rows, weight, mask_token_id, temperature, uniform, entropy)
    if uniform is None or nucleus is False:
        return stats
    return _redraw_nucleus(stats, hidden, rows, weight, mask_token_id, temperature, top_p, uniform)


def _redraw_nucleus(
    stats: RowStats,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    mask_token_id: int | None,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> RowStats:
    """`stats` with the rows that sample from a nucleus drawn again from whole rows of logits."""
    which = ((top_p < 1.0) & (temperature > 0)).nonzero()[:, 0]
    if len(which) == 0:
        return stats
    again = reference.head_confidence(
        hidden,
        rows[which],
        weight,
        mask_token_id,
        temperature[which],
        top_p[which],
        uniform[which],
        False,
        MAX_CHUNK_ELEMENTS,
    )
    return RowStats(
        stats.token.index_copy(0, which, again.token),
        stats.confidence.index_copy(0, which, again.confidence),
        stats.logprob.index_copy(0, which, again.logprob),
        stats.entropy,
    )
