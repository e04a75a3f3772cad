"""The head on a CPU with a large vocabulary: one online pass over tiles that stay in the cache. Derivation: README.md.

Shape legend: m rows, V vocabulary, d hidden, T tiles, P parts of all tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fewstep.kernels.confidence import RowStats
from fewstep.kernels.linear import PackedWeight

# Over eager torch, one core with AMX, bf16, d = 1,024 (bench/results/cpu-head.json): 128 rows of V = 32,768 1.6 times as
# fast, 256 rows of V = 126,464 2.1 times, 256 drawing rows 3.4 times. Tiles of 1,024 and 16,384 lost 10-30 % to 4,096.
TILE = 4096
# Below these it need not pay: 32 greedy rows of V = 32,768 took 0.7 to 1.1 times as long, 32 of V = 8,192 1.2 times.
MIN_VOCABULARY, MIN_ELEMENTS = 1 << 14, 1 << 21
# max(-1) with an index takes 0.41 ns an element and amax 0.07: maxima of parts first, an index only in the best one.
_PART = 64
# exp of anything lower is 0 in float32, and 0 · finite is 0 where 0 · -inf is NaN.
_NOTHING = -200.0


def pays(num_rows: int, vocabulary: int) -> bool:
    """Whether this beats the reference, by measurement; rows that sample gain more than greedy ones."""
    return vocabulary >= MIN_VOCABULARY and num_rows * vocabulary >= MIN_ELEMENTS


def _best(tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """max(-1) with the lowest index, keepdim."""
    if tile.shape[1] % _PART:
        return tile.max(-1, keepdim=True)  # type: ignore[return-value]
    parts = tile.view(len(tile), tile.shape[1] // _PART, _PART)
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
    temperature: torch.Tensor,
    uniform: torch.Tensor | None,
    entropy: bool,
    packed: list[PackedWeight] | None = None,
) -> RowStats:
    """See `fewstep.kernels.head.head_confidence`; `hidden` is final-normed and every top_p is 1.

    Args:
        packed: the weight's tiles as `pack_head` makes them.

    Online softmax (Milakov and Gimelshein, 1805.02867, algorithm 3), with the entropy's sum carried along.
    """
    x = hidden.index_select(0, rows)
    top = torch.full((len(rows), 1), -torch.inf)
    token = torch.zeros(len(rows), 1, dtype=torch.int64)
    total, moment = torch.zeros(len(rows), 1), torch.zeros(len(rows), 1)
    draw = None if uniform is None else _Draw(temperature, uniform)
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
        if draw is not None:
            draw.add_tile(shifted, shift)
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
    token, logprob = token[:, 0], -total.log()[:, 0]
    spread = (total.log() - moment / total)[:, 0] if entropy else None
    if draw is not None:
        sampled, logit = draw.finish(x, weight, mask_token_id)
        hot = temperature > 0
        token = torch.where(hot, sampled, token)
        logprob = torch.where(hot, logit - (top + total.log())[:, 0], logprob)
    return RowStats(token, logprob.exp(), logprob, spread)


class _Draw:
    """Inverse CDF over tiles: the tempered mass of every part is kept, and the part that u falls in projected again.

    Args:
        temperature: float32 [m]; rows at 0 are drawn too, at 1, and not used. uniform: float64 [m].
    """

    def __init__(self, temperature: torch.Tensor, uniform: torch.Tensor) -> None:
        self._heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
        self._uniform = uniform[:, None]
        self._masses: list[torch.Tensor] = []
        self._shifts: list[torch.Tensor] = []

    def add_tile(self, shifted: torch.Tensor, shift: torch.Tensor) -> None:
        """Take a tile's logits less `shift` [m, 1]."""
        mass = (shifted / self._heat).exp_()
        if mass.shape[1] % _PART:
            mass = F.pad(mass, (0, -mass.shape[1] % _PART))
        parts = mass.view(len(mass), mass.shape[1] // _PART, _PART).sum(-1)
        self._masses.append(parts)
        self._shifts.append(shift.expand_as(parts))

    def finish(
        self, x: torch.Tensor, weight: torch.Tensor, mask_token_id: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(token int64 [m], its logit float32 [m]) of rows x [m, d] under weight [V, d]."""
        masses, shifts = torch.cat(self._masses, 1), torch.cat(self._shifts, 1)
        # The last tile's shift is the maximum of the whole row.
        cumulative = (masses * ((shifts - shifts[:, -1:]) / self._heat).exp_()).cumsum(1, dtype=torch.float64)
        target = self._uniform * cumulative[:, -1:]
        part = (cumulative <= target).sum(1, keepdim=True).clamp_(max=masses.shape[1] - 1)
        before = torch.where(part > 0, cumulative.gather(1, (part - 1).clamp_(min=0)), 0.0)
        # What is left of the target, as a share of the part's own mass.
        left = (target - before) / (cumulative.gather(1, part) - before)
        tokens = part * _PART + torch.arange(_PART)
        allowed = tokens < len(weight)
        if mask_token_id is not None:
            allowed &= tokens != mask_token_id
        logits = _project_tokens(x, weight, tokens.clamp(max=len(weight) - 1))
        logits = logits.masked_fill(~allowed, -torch.inf)
        mass = ((logits - shifts.gather(1, part)) / self._heat).exp_()
        inside = mass.cumsum(1, dtype=torch.float64)
        # Rounding may leave the target above the whole part; then its last token of any weight.
        last = torch.where(mass > 0, torch.arange(_PART), 0).amax(1, keepdim=True)
        pick = torch.minimum((inside <= left * inside[:, -1:]).sum(1, keepdim=True), last)
        return tokens.gather(1, pick)[:, 0].clamp_(max=len(weight) - 1), logits.gather(1, pick)[:, 0]


def _project_tokens(x: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [m, P']: logits of each row's own tokens, int64 [m, P'], rounded as those of a tile are."""
    # 16 rows of 64 tokens at a time: 8 MiB of gathered bfloat16 weights at d = 4,096.
    pairs = zip(torch.split(x, 16), torch.split(tokens, 16), strict=True)
    return torch.cat([torch.bmm(weight[own], row[:, :, None])[:, :, 0] for row, own in pairs]).float()
