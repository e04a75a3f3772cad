"""Block-diffusion attention (BD3-LM, 2503.09573): the visibility rule of training, and the engine's over pages.

Every row belongs to a block (position // block_size) and to a *copy* of the sequence: copy 0 is clean, copies
1, 2, ... are noisy states of it, -1 is padding. A row sees

    the clean rows of earlier blocks, and the rows of its own block in its own copy,

which is M_BD, M_OBC and M_BC of the paper in one line. Clean rows never see noisy ones, so their keys and
values are exactly those a cache would hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def visibility(
    positions: torch.Tensor, copies: torch.Tensor, block_size: int, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Which key rows each query row sees.

    Args:
        positions: int [N, R], absolute positions; copies: int [N, R].
        documents: int [N, R], which of a row's packed documents it belongs to; none sees another. None = one each.
    Returns:
        bool [N, R, R], True = visible. Padding rows see themselves only, so that no softmax is empty.
    """
    block = positions // block_size
    block_q, block_k = block[:, :, None], block[:, None, :]
    copy_q, copy_k = copies[:, :, None], copies[:, None, :]
    sees_past = (copy_k == 0) & (block_k < block_q)
    sees_own = (copy_k == copy_q) & (block_k == block_q)
    real = (copy_q >= 0) & (copy_k >= 0)
    if documents is not None:
        real &= documents[:, :, None] == documents[:, None, :]
    itself = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)[None]
    return ((sees_past | sees_own) & real) | itself


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """softmax(q·kᵀ / sqrt(head_dim) + mask)·v.

    Args:
        q: [N, R, heads, head_dim]; k, v: [N, S, kv_heads, head_dim], kv_heads divides heads.
        visible: bool [N, R, S].
    Returns:
        [N, R, heads, head_dim].
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None],
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


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
) -> torch.Tensor:
    """The definition, a unit at a time, softmax in float32; arguments in `fewstep.kernels.attention.block_attention`."""
    out = torch.zeros_like(q)
    page_size, heads_per_kv = key_pages.shape[1], q.shape[2] // k.shape[2]
    block = torch.arange(q.shape[1], device=q.device) // own_block
    ranges = torch.stack((prefix, suffix_start, suffix_end, own_len), dim=1).tolist()
    for n, (end, start, stop, own) in enumerate(ranges):
        cached = torch.arange(max(end, stop), device=q.device)
        cached = cached[(cached < end) | ((cached >= start) & (cached < stop))]
        page, offset = page_table[n, cached // page_size].long(), cached % page_size
        keys = torch.cat((key_pages[page, offset], k[n, :own])).repeat_interleave(heads_per_kv, dim=1).float()
        values = (
            torch.cat((value_pages[page, offset], v[n, :own])).repeat_interleave(heads_per_kv, dim=1).float()
        )
        scores = torch.einsum("rhd,shd->hrs", q[n, :own].float(), keys) * q.shape[3] ** -0.5
        later = block[:own] > block[:own, None]
        scores[:, :, len(cached) :].masked_fill_(later, -torch.inf)
        out[n, :own] = torch.einsum("hrs,shd->rhd", scores.softmax(-1), values).to(q.dtype)
    return out
