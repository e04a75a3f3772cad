"""Logits of one sequence by the plain formulas: no cache but the two that are the thing to be imitated.

Shape legend: R rows of this forward, S rows seen, H heads, K key/value heads, D head dimension, L window, V vocabulary.
"""

from __future__ import annotations

import math

import torch

from fewstep.kernels.model.transformer import Transformer


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [R, heads, D] with cos, sin [R, 1, D/2], half-split."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """softmax(q·kᵀ/√D)·v; q [R, H, D], k and v [S, K, D], visible bool [R, S] to [R, H, D]."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = torch.einsum("rhd,shd->hrs", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return torch.einsum("hrs,shd->rhd", weights, v)


@torch.no_grad()
def block_causal_logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """[L, V]: every row sees the blocks before its own and its own."""
    block = torch.arange(len(tokens)) // model.config.block_size
    visible = block[None, :] <= block[:, None]

    def attention(_layer, q, k, v, cos, sin):
        return look(rotate(q[0], cos[0], sin[0]), rotate(k[0], cos[0], sin[0]), v[0], visible)[None]

    hidden = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], attention)
    return model.logits(hidden)[0]


class Window:
    """A bidirectional model's window, and the keys and values its last whole forward left behind.

    Fast-dLLM (2505.22618): a forward over part of the window computes keys and values of its own rows and takes
    those of every other position from the last whole forward.

    Attributes:
        drifts: for each whole forward but the first, ‖K - K'‖ / ‖K‖ of the keys K that replaced K', mean over layers.
    """

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.drifts: list[float] = []

    def forget(self) -> None:
        """Drop what was kept, as under new weights."""
        self.keys, self.values = {}, {}

    @torch.no_grad()
    def logits(self, model: Transformer, tokens: list[int], first: int, end: int) -> torch.Tensor:
        """[L, V], NaN outside the rows `first` to `end` that this forward runs."""
        whole = end - first == len(tokens)
        changes: list[float] = []

        def attention(layer, q, k, v, cos, sin):
            own_keys, own_values = rotate(k[0], cos[0], sin[0]), v[0]
            if whole:
                if layer in self.keys:
                    change = (own_keys - self.keys[layer]).norm() / own_keys.norm()
                    changes.append(float(change))
                self.keys[layer], self.values[layer] = own_keys, own_values
            keys, values = self.keys[layer].clone(), self.values[layer].clone()
            keys[first:end], values[first:end] = own_keys, own_values
            everything = torch.ones(end - first, len(tokens), dtype=torch.bool)
            return look(rotate(q[0], cos[0], sin[0]), keys, values, everything)[None]

        rows = torch.arange(first, end)[None]
        out = torch.full((len(tokens), model.config.vocab_size), math.nan)
        out[first:end] = model.logits(model(torch.tensor([tokens[first:end]]), rows, attention))[0]
        if changes:
            self.drifts.append(sum(changes) / len(changes))
        return out
