"""Keys and values of clean blocks, one slot a sequence, and the attention of a packed forward over them.

Shape legend: n sequences of one group, r rows each (whole blocks), c cached positions (padded to the group's
longest), K key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.actors.engine.request import context_length
from fewstep.kernels.attention import attend
from fewstep.kernels.model.config import ModelConfig


@dataclass(frozen=True)
class RowGroup:
    """Sequences that contribute the same number of blocks, packed one after another.

    Attributes:
        first_row: where the group starts in the packed rows.
        slots: int64 [n]; num_rows: r; num_cached: c.
        visible: bool [n, r, c + r].
        clean_positions: int64 [n, r - B], absolute positions of the rows whose keys and values are final.
    """

    first_row: int
    slots: torch.Tensor
    num_rows: int
    num_cached: int
    visible: torch.Tensor
    clean_positions: torch.Tensor


class SlotCache:
    """float32 [layers, slots, context, K, D], for keys and for values; zeroed, so untouched pages cost nothing."""

    def __init__(self, config: ModelConfig, num_slots: int, device: torch.device) -> None:
        shape = (
            config.num_hidden_layers,
            num_slots,
            context_length(config),
            config.num_key_value_heads,
            config.head_dim,
        )
        self.block_size = config.block_size
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)

    def wipe(self, slot: int) -> None:
        """Zero a slot: a NaN left behind would reach its next user even under a mask, as 0 · NaN."""
        self.keys[:, slot] = 0
        self.values[:, slot] = 0

    def group(self, first_row: int, slots: torch.Tensor, num_blocks: int, cached: torch.Tensor) -> RowGroup:
        """The group of sequences at `slots` that follow `cached` int64 [n] positions with `num_blocks` blocks."""
        rows, device = num_blocks * self.block_size, slots.device
        longest = int(cached.max())
        block = torch.arange(rows, device=device) // self.block_size
        past = torch.arange(longest, device=device) < cached[:, None]
        own = block[:, None] >= block
        visible = torch.cat(
            (past[:, None].expand(-1, rows, -1), own.expand(len(slots), -1, -1)),
            dim=-1,
        )
        clean = cached[:, None] + torch.arange(rows - self.block_size, device=device)
        return RowGroup(first_row, slots, rows, longest, visible, clean)


class PackedAttention:
    """The attention callback of one forward: a group at a time over its cache and its own rows."""

    def __init__(self, cache: SlotCache, groups: list[RowGroup]) -> None:
        self.cache, self.groups = cache, groups

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [1, R, H, D], k and v [1, R, K, D] to [1, R, H, D]; final rows go into the cache, live ones never."""
        out = torch.empty_like(q)
        for group in self.groups:
            size = len(group.slots)
            rows = slice(group.first_row, group.first_row + size * group.num_rows)
            own_k = k[0, rows].reshape(size, group.num_rows, *k.shape[2:])
            own_v = v[0, rows].reshape(size, group.num_rows, *v.shape[2:])
            all_k = self._after_past(self.cache.keys[layer], group, own_k)
            all_v = self._after_past(self.cache.values[layer], group, own_v)
            own_q = q[0, rows].reshape(size, group.num_rows, *q.shape[2:])
            out[0, rows] = attend(own_q, all_k, all_v, group.visible).flatten(0, 1)
            num_clean = group.clean_positions.shape[1]
            if num_clean:
                where = (group.slots[:, None], group.clean_positions)
                self.cache.keys[layer][where] = own_k[:, :num_clean]
                self.cache.values[layer][where] = own_v[:, :num_clean]
        return out

    @staticmethod
    def _after_past(store: torch.Tensor, group: RowGroup, own: torch.Tensor) -> torch.Tensor:
        """[n, c + r, K, D]: the slots' cached positions, then the rows of this forward."""
        if not group.num_cached:
            return own
        return torch.cat((store[:, : group.num_cached].index_select(0, group.slots), own), dim=1)
