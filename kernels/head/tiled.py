"""The greedy head on a CPU with a large vocabulary: one online pass over tiles that stay in the cache.

Shape legend: m rows, V vocabulary, T tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fewstep.kernels.confidence import RowStats
from fewstep.kernels.linear import PackedWeight

# One EPYC core with AVX-512, bf16, d = 1024, ms of the reference against this: 32 rows 10.1 / 7.2 (V = 32,768) and
# 47 / 36 (V = 126,464), 128 rows 24 / 17, 256 rows 49 / 30 and 359 / 110; fp32, d = 576, V = 49,152: 24 / 21 and
# 154 / 97. Tiles of 1,024 and 16,384 lost 10-30 %.
TILE = 4096
# Below these it does not pay: 8 rows of V = 32,768 took 5.1 ms against 5.6, 32 rows of V = 8,192 as long.
MIN_VOCABULARY, MIN_ELEMENTS = 1 << 14, 1 << 20
# max(-1) with an index takes 0.41 ns an element and amax 0.07: maxima of parts first, an index only in the best one.
_PART = 64
# exp of anything lower is 0 in float32, and 0 · finite is 0 where 0 · -inf is NaN.
_NOTHING = -200.0


def pays(num_rows: int, vocabulary: int) -> bool:
    """Whether this beats the reference for greedy rows, by measurement."""
    return vocabulary >= MIN_VOCABULARY and num_rows * vocabulary >= MIN_ELEMENTS


def _best(tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """max(-1) with the lowest index, keepdim."""
    if tile.shape[1] % _PART:
        return tile.max(-1, keepdim=True)  # type: ignore[return-value]
    parts = tile.view(len(tile), -1, _PART)
    best, part = parts.amax(-1).max(-1, keepdim=True)
    inside = parts.gather(1, part[:, :, None].expand(-1, -1, _PART))[:, 0].argmax(-1, keepdim=True)
    return best, part * _PART + inside


def pack_head(weight: torch.Tensor) -> list[PackedWeight] | None:
    """The tiles of a large head [V, d], each laid out for the matrix unit; None where that is no gain."""
    if len(weight) < MIN_VOCABULARY or not PackedWeight.supported(weight):
        return None
    return [PackedWeight(tile) for tile in torch.split(weight.detach(), TILE)]


def head_confidence(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    mask_token_id: int | None,
    entropy: bool,
    packed: list[PackedWeight] | None = None,
) -> RowStats:
    """See `fewstep.kernels.head.head_confidence`; `hidden` is final-normed and no row samples.

    Args:
        packed: the weight's tiles as `pack_head` makes them.

    Online softmax (Milakov and Gimelshein, 1805.02867, algorithm 3), with the entropy's sum carried along.
    """
    x = hidden.index_select(0, rows)
    top = torch.full((len(rows), 1), -torch.inf)
    token = torch.zeros(len(rows), 1, dtype=torch.int64)
    total, moment = torch.zeros(len(rows), 1), torch.zeros(len(rows), 1)
    for first in range(0, len(weight), TILE):
        product = (
            F.linear(x, weight[first : first + TILE]) if packed is None else packed[first // TILE].linear(x)
        )
        scores = product.float()
        if mask_token_id is not None and first <= mask_token_id < first + scores.shape[1]:
            scores[:, mask_token_id - first] = -torch.inf
        best, index = _best(scores)
        higher = torch.maximum(top, best)
        token = torch.where(best > top, first + index, token)
        # A maximum of -inf means no token yet; 0 in its place keeps -inf - -inf out.
        shift = higher.masked_fill(higher == -torch.inf, 0.0)
        rescale = (top - shift).exp()
        shifted = scores.sub_(shift)
        if entropy:
            mass = shifted.clamp_(min=_NOTHING).exp()
            # Σ e^(l - shift) · (l - shift) of the tiles before, rebased from the maximum they knew.
            drop = (top - shift).clamp(min=_NOTHING)
            moment = rescale * (moment + drop * total) + (mass * shifted).sum(-1, keepdim=True)
        else:
            mass = shifted.exp_()
        total = total * rescale + mass.sum(-1, keepdim=True)
        top = higher
    # The best token's own term is e^0, so its probability is 1 / total.
    logprob = -total.log()[:, 0]
    spread = (total.log() - moment / total)[:, 0] if entropy else None
    return RowStats(token[:, 0], logprob.exp(), logprob, spread)
