"""Attention of denoising rows over a paged cache: torch on the CPU, one Triton pass on a GPU.

Shape legend: N units (a sequence's rows of one forward), r rows a unit, H query heads, K key/value heads, D head
dimension, P pages, s positions a page.
"""

from __future__ import annotations

from typing import Literal

import torch

from fewstep.kernels.attention import reference
from fewstep.kernels.attention.gathered import GatherPlan, gathered_attention
from fewstep.kernels.launch import implementation_for


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    prefix: torch.Tensor,
    suffix_start: torch.Tensor,
    suffix_end: torch.Tensor,
    own_len: torch.Tensor,
    own_block: int,
    *,
    plan: GatherPlan | None = None,
    layer: int | None = None,
    impl: Literal["reference", "gathered", "fused"] | None = None,
) -> torch.Tensor:
    """softmax(q·kᵀ / sqrt(D))·v of each unit's rows over its cached positions and its own rows.

    Row i of unit n sees the cached positions p with p < prefix[n] or suffix_start[n] <= p < suffix_end[n], and its own
    rows j < own_len[n] with j // own_block <= i // own_block. Rows from own_len[n] on are padding and give zeros.
    No gradient.

    Args:
        q: [N, r, H, D], k, v: [N, r, K, D], q and k rotated; K divides H.
        key_pages, value_pages: [P, s, K, D] of the type of q; only visible positions are used, whatever stands in others.
        page_table: int32 [N, max_pages]; position p of unit n is page page_table[n, p // s], offset p % s. Entries
            without a visible position may be anything.
        prefix, suffix_start, suffix_end, own_len: int32 [N]; an empty suffix has suffix_end <= suffix_start.
        own_block: rows that see each other; at least r = all do.
        plan: gathered only: a plan made of the same arguments, shared by the layers of a forward (see `GatherPlan`).
        layer: gathered only: the number a plan that keeps its pages keeps them under.
        impl: None = fused for CUDA tensors, else gathered.
    Returns:
        [N, r, H, D].
    Errors:
        ResourceError: fused was asked for where it cannot run.
    """
    chosen = implementation_for("block_attention", impl, q)
    if chosen == "fused":
        from fewstep.kernels.attention import fused

        return fused.block_attention(
            q, k, v, key_pages, value_pages, page_table, prefix, suffix_start, suffix_end, own_len, own_block
        )
    if chosen == "reference" and impl is not None:
        return reference.block_attention(
            q, k, v, key_pages, value_pages, page_table, prefix, suffix_start, suffix_end, own_len, own_block
        )
    if plan is not None:
        return plan.attend(q, k, v, key_pages, value_pages, layer)
    return gathered_attention(
        q, k, v, key_pages, value_pages, page_table, prefix, suffix_start, suffix_end, own_len, own_block
    )
