"""Keys and values in pages, and the attention of a packed forward over them.

Shape legend: R packed rows, n sequences of one group, r rows each, P pages, s page size in positions, K key/value heads,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import psutil
import torch

from fewstep.actors.engine.request import context_length
from fewstep.kernels.attention import GatherPlan, block_attention
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.rope import apply_rope, rope_and_write

# A bidirectional model's pages belong to one sequence each, so their size is free.
_BIDIRECTIONAL_PAGE_SIZE = 16
# Gathered keys and values that one group may keep from forward to forward.
_MAX_KEPT_BYTES = 1 << 28


def page_size(config: ModelConfig) -> int:
    """Positions of a page: a block, so that a page is final as a whole; any number for a bidirectional model."""
    return config.block_size if config.attention_kind == "block_causal" else _BIDIRECTIONAL_PAGE_SIZE


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, keys and values."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * page_size(config) * dtype.itemsize


def num_pages_for(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_sequences: int,
    memory_bytes: int | None,
) -> int:
    """Pages that fit the budget; never more than all sequences at full context can use.

    Args:
        memory_bytes: None = what all sequences can use, but no more than half of the device's memory that is free now.
    """
    size = page_bytes(config, dtype)
    usable = max_sequences * (-(-context_length(config) // page_size(config)))
    budget = memory_bytes if memory_bytes is not None else free_bytes(device) // 2
    return min(usable, budget // size)


def free_bytes(device: torch.device) -> int:
    """Memory that the device has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class PageStore:
    """[layers, P, s, K, D], for keys and for values.

    Attributes:
        on_wipe: told of wiped pages, for whoever holds other heads of the same pages.
    """

    on_wipe: Callable[[list[int]], None] | None = None

    def __init__(self, config: ModelConfig, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.page_size, self.page_bytes = page_size(config), page_bytes(config, dtype)
        self.width = config.num_attention_heads * config.head_dim
        shape = (
            config.num_hidden_layers,
            num_pages,
            self.page_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.keys, self.values = (_zeros(shape, dtype, device) for _ in range(2))

    def wipe(self, pages: list[int]) -> None:
        """Zero pages: a NaN left behind would reach its next user even under a mask, as 0 · NaN."""
        self.keys[:, pages] = 0
        self.values[:, pages] = 0
        if self.on_wipe is not None:
            self.on_wipe(pages)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory when they are first written: torch.zeros touches every page at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
    return torch.from_numpy(raw).view(dtype)


@dataclass(frozen=True)
class RowGroup:
    """Sequences that contribute the same number of rows, packed one after another.

    Attributes:
        first_row: where the group starts in the packed rows; num_rows: r; own_block: rows i and j of a sequence see
            each other iff j // own_block <= i // own_block.
        page_table: int32 [n, pages]; bounds: int32 [4, n], prefix, suffix_start, suffix_end, own_len of
            `block_attention`.
        plan: what the layers share of it on a CPU.
    """

    first_row: int
    num_rows: int
    own_block: int
    page_table: torch.Tensor
    bounds: torch.Tensor
    plan: GatherPlan | None

    @classmethod
    def of(
        cls,
        store: PageStore,
        first_row: int,
        num_rows: int,
        own_block: int,
        page_table: torch.Tensor,
        bounds: torch.Tensor,
        device: torch.device,
        keep: bool,
    ) -> RowGroup:
        """A group on its device.

        Args:
            page_table, bounds: on the CPU.
            keep: gathered pages stay for the next forward with the same group, if they are not too many.
        """
        plan = None
        if device.type == "cpu":
            pages = int(bounds[:3].amax(0).sum()) // store.page_size
            prefix, suffix_start, suffix_end, own_len = bounds
            plan = GatherPlan(
                page_table,
                prefix,
                suffix_start,
                suffix_end,
                own_len,
                own_block,
                num_rows=num_rows,
                page_size=store.page_size,
                width=store.width,
                keep=keep and pages * store.page_bytes <= _MAX_KEPT_BYTES,
            )
        return cls(first_row, num_rows, own_block, page_table.to(device), bounds.to(device), plan)


class StaleRows(NamedTuple):
    """int64 [m] packed rows, int64 [m] index of the sequence each belongs to, and how many such sequences there are."""

    rows: torch.Tensor
    owner: torch.Tensor
    num_sequences: int


class PackedAttention:
    """The attention callback of one forward: keys that became final go into their pages, then a group at a time.

    Writing first is what lets two sequences with the same prompt share it within one forward: the second reads what the
    first has just written.

    Args:
        destination: int64 [R], flat position in the pages (page · s + offset), -1 for rows that are not kept; None: no
            row is.
        stale: rows of sequences whose approximate cache this forward refreshes; None where there are none.
    Attributes:
        drift: float32 [number of sequences with stale rows], ‖K - K'‖ / ‖K‖ summed over layers.
        total: sums over those who hold other heads; None = all heads are here.
    """

    total: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(
        self,
        store: PageStore,
        groups: list[RowGroup],
        destination: torch.Tensor | None,
        stale: StaleRows | None = None,
    ) -> None:
        self.store, self.groups, self.destination, self.stale = store, groups, destination, stale
        self.drift = torch.zeros(0 if stale is None else stale.num_sequences, device=store.keys.device)

    def __call__(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """q [1, R, H, D], k and v [1, R, K, D] to [1, R, H, D]; final rows go into the pages, live ones never."""
        keys, values = self.store.keys[layer], self.store.values[layer]
        old = None
        if self.stale is not None and self.destination is not None:
            old = keys.flatten(0, 1)[self.destination[self.stale.rows]]
        q = apply_rope(q, cos, sin)
        k = rope_and_write(k[0], v[0], cos[0, :, 0], sin[0, :, 0], self.destination, keys, values)
        if old is not None:
            self._add_drift(old, k)
        parts = [self._attend(group, layer, q[0], k, v[0], keys, values) for group in self.groups]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _attend(
        self,
        group: RowGroup,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        shape = (group.bounds.shape[1], group.num_rows)
        rows = slice(group.first_row, group.first_row + shape[0] * shape[1])
        prefix, suffix_start, suffix_end, own_len = group.bounds
        out = block_attention(
            q[rows].view(*shape, *q.shape[1:]),
            k[rows].view(*shape, *k.shape[1:]),
            v[rows].view(*shape, *v.shape[1:]),
            keys,
            values,
            group.page_table,
            prefix,
            suffix_start,
            suffix_end,
            own_len,
            group.own_block,
            plan=group.plan,
            layer=layer,
        )
        return out.flatten(0, 1)

    def _add_drift(self, old: torch.Tensor, k: torch.Tensor) -> None:
        assert self.stale is not None
        rows, owner = self.stale.rows, self.stale.owner
        new = k[rows].float()
        squares = torch.stack(((new - old.float()).square(), new.square())).flatten(2).sum(2)
        sums = torch.zeros((2, len(self.drift)), device=self.drift.device).index_add_(1, owner, squares)
        changed, whole = sums if self.total is None else self.total(sums)
        self.drift += (changed / whole.clamp(min=1e-30)).sqrt()
