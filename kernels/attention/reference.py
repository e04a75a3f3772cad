"""Block-diffusion attention (BD3-LM, 2503.09573): one visibility rule for training and for the engine.

Every row belongs to a block (position // block_size) and to a *copy* of the sequence: copy 0 is clean, copies
1, 2, ... are noisy states of it, -1 is padding. A row sees

    the clean rows of earlier blocks, and the rows of its own block in its own copy,

which is M_BD, M_OBC and M_BC of the paper in one line. Clean rows never see noisy ones, so their keys and
values are exactly those a cache would hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def visibility(positions: torch.Tensor, copies: torch.Tensor, block_size: int) -> torch.Tensor:
    """Which key rows each query row sees.

    Args:
        positions: int [N, R], absolute positions; copies: int [N, R].
    Returns:
        bool [N, R, R], True = visible. Padding rows see themselves only, so that no softmax is empty.
    """
    block = positions // block_size
    block_q, block_k = block[:, :, None], block[:, None, :]
    copy_q, copy_k = copies[:, :, None], copies[:, None, :]
    sees_past = (copy_k == 0) & (block_k < block_q)
    sees_own = (copy_k == copy_q) & (block_k == block_q)
    real = (copy_q >= 0) & (copy_k >= 0)
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
