"""Block attention on the CPU: pages gathered side by side, own rows behind them, one softmax attention call.

What is visible to whom is the same in every layer of a forward, so it is worked out once, in a `GatherPlan`.

Shape legend as in `dispatch.py`; n neighbouring units that are attended together, C pages gathered for each of them,
c positions before the own rows (C·s, or what is visible of it).

What was measured for it, one thread of a Xeon with AVX-512, fp32, 16 rows, 4 heads of 32 / 12 heads of 64 with 4
kv heads (us a layer; `index_select` and torch's attention are most of what is left):

    gather 64 x 64 positions: advanced indexing 877 / 1464, index_select into one room 309 / 624
    attend 64 x 80 positions: batched matrix products 1331 / 4079, torch's attention 714 / 3036, a call a unit 1227 / 3528
    attend 1 x 80 positions: no mask 13 / 45, float mask 14 / 43, bool mask, which becomes a float one, 18 / 47
    keys by run of pages in place, joined by their log-sum-exp: 2399 / 5979 against 1041 / 3600 for gather and attend
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F

# Multiply-adds that padding shorter units to the longest may waste before they are attended in a call of their own,
# which costs about 25 us at 50 GFLOP/s.
_SPLIT_WORK = 1 << 19


@dataclass(frozen=True, eq=False)
class _Run:
    """Units that share one call.

    Attributes:
        units: which of the batch.
        index: int32 [n·(C + own pages)], the pages to gather; the places of own rows hold any page. None: nothing.
        num_past: c.
        hidden: int64, positions of the flat room [n·(C + own pages)·s] before own rows that nobody sees.
        padding: int64, positions of the flat room that hold rows beyond a unit's own; unused: bool [n, r, 1, 1], these
            rows. None without any.
        visible: bool [1 or n, 1, r, c + r]; None when every row sees every position.
    """

    units: slice
    index: torch.Tensor | None
    num_past: int
    hidden: torch.Tensor | None
    padding: torch.Tensor | None
    unused: torch.Tensor | None
    visible: torch.Tensor | None
    bias: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)
    rooms: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype, heads_per_kv: int) -> torch.Tensor | None:
        """`visible` of every row, `heads_per_kv` times, as what is added to scores; made once and not in every layer."""
        if self.visible is None:
            return None
        if dtype not in self.bias:
            zeros = torch.zeros(self.visible.shape, dtype=dtype).masked_fill_(~self.visible, -torch.inf)
            self.bias[dtype] = zeros.repeat_interleave(heads_per_kv, dim=2)
        return self.bias[dtype]


class GatherPlan:
    """What one batch of units sees, for all layers of a forward, or of several while none of it changes.

    Units of similar length should be neighbours: a stretch of them is padded to its longest.

    Args:
        page_table, prefix, suffix_start, suffix_end, own_len, own_block: see `block_attention`.
        num_rows: r; page_size: s; width: H·D, for the cost of padding.
        keep: gathered pages of layers attended by number stay for the next forward with this plan, at the price of a
            copy of what is visible. The caller drops the plan when a visible position is written.
    """

    def __init__(
        self,
        page_table: torch.Tensor,
        prefix: torch.Tensor,
        suffix_start: torch.Tensor,
        suffix_end: torch.Tensor,
        own_len: torch.Tensor,
        own_block: int,
        *,
        num_rows: int,
        page_size: int,
        width: int,
        keep: bool = False,
    ) -> None:
        self.num_rows, self.page_size, self.own_block, self.keep = num_rows, page_size, own_block, keep
        ranges = torch.stack((prefix, suffix_start, suffix_end, own_len)).tolist()
        # Pages of the prefix, then those of the suffix that the prefix does not hold already.
        self._prefix_pages = [-(-end // page_size) for end in ranges[0]]
        self._suffix_page = [
            max(first, start // page_size) for first, start in zip(self._prefix_pages, ranges[1], strict=True)
        ]
        lengths = [
            first + (max(0, -(-stop // page_size) - page) if stop > start else 0)
            for first, page, start, stop in zip(
                self._prefix_pages, self._suffix_page, ranges[1], ranges[2], strict=True
            )
        ]
        self._ranges, self._lengths, self._page_table = ranges, lengths, page_table
        self._runs = [self._run(units) for units in self._stretches(num_rows * page_size * width)]

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        layer: int | None = None,
    ) -> torch.Tensor:
        """[N, r, H, D] of q [N, r, H, D], own k and v [N, r, K, D] and a layer's pages [P, s, K, D]."""
        if len(self._runs) == 1:
            return self._attend_run(self._runs[0], q, k, v, key_pages, value_pages, layer)
        out = torch.empty_like(q)
        for run in self._runs:
            own_q, own_k, own_v = q[run.units], k[run.units], v[run.units]
            out[run.units] = self._attend_run(run, own_q, own_k, own_v, key_pages, value_pages, layer)
        return out

    @cached_property
    def _numbers(self) -> torch.Tensor:
        """int64 [7, N]: the ranges, pages, prefix pages and suffix page; only batches that are not alike need it."""
        return torch.tensor([*self._ranges, self._lengths, self._prefix_pages, self._suffix_page])

    def _attend_run(
        self,
        run: _Run,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        layer: int | None,
    ) -> torch.Tensor:
        if run.index is not None:
            room = self._room(run, len(q), key_pages, value_pages, layer)
            own = slice(run.num_past, run.num_past + self.num_rows)
            room[0, :, own], room[1, :, own] = k, v
            if run.padding is not None:
                room.flatten(1, 2).index_fill_(1, run.padding, 0)
            k, v = room[0, :, : own.stop], room[1, :, : own.stop]
        num_units, num_rows, num_heads, width = q.shape
        num_kv, shared = k.shape[2], num_heads // k.shape[2]
        # Heads that share keys become rows of one head: 174 us against enable_gqa's 235 (bf16, 32 rows of 12 heads on
        # 4, 512 positions).
        folded = q.view(num_units, num_rows, num_kv, shared, width).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            folded.reshape(num_units, num_kv, num_rows * shared, width),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=run.mask(q.dtype, shared),
        )
        out = out.view(num_units, num_kv, num_rows, shared, width).transpose(1, 2).reshape(q.shape)
        return out if run.unused is None else out.masked_fill(run.unused, 0)

    def _room(
        self,
        run: _Run,
        num_units: int,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        layer: int | None,
    ) -> torch.Tensor:
        """[2, n, (C + own pages)·s, K, D] with the visible pages of keys and of values in it, hidden positions 0."""
        assert run.index is not None
        name = layer if self.keep else None
        filled = name is not None and name in run.rooms
        if name not in run.rooms:
            # One for all layers unless kept: fresh memory for each took twice as long.
            run.rooms[name] = key_pages.new_empty((2, len(run.index), *key_pages.shape[1:]))
        pages = run.rooms[name]
        room = pages.view(2, num_units, -1, *key_pages.shape[2:])
        if not filled:
            torch.index_select(key_pages, 0, run.index, out=pages[0])
            torch.index_select(value_pages, 0, run.index, out=pages[1])
            if run.hidden is not None:
                # A NaN there would come through the mask, as 0 · NaN.
                room.flatten(1, 2).index_fill_(1, run.hidden, 0)
        return room

    def _stretches(self, work_per_page: int) -> Iterator[slice]:
        """The batch cut where padding the units seen so far, or the next one, would cost more than another call."""
        first, longest = 0, 0
        for n, length in enumerate(self._lengths):
            padded = (n - first) * (length - longest) if length > longest else longest - length
            if n > first and padded * work_per_page > _SPLIT_WORK:
                yield slice(first, n)
                first, longest = n, 0
            longest = max(longest, length)
        yield slice(first, len(self._lengths))

    def _run(self, units: slice) -> _Run:
        prefixes, starts, stops, owns = (column[units] for column in self._ranges)
        most, size, rows = max(self._lengths[units], default=0), self.page_size, self.num_rows
        full = all(own == rows for own in owns)
        suffixes = any(
            stop > max(start, end) for end, start, stop in zip(prefixes, starts, stops, strict=True)
        )
        alike = len(set(prefixes)) == 1 and not suffixes
        own_pages = -(-rows // size)
        if alike and full:
            past = prefixes[0]
            cached = hidden = None
        else:
            past = most * size
            cached = self._cached(units, most)
            hidden = _positions(~cached, 0, (most + own_pages) * size)
        padding = unused = None
        if not full:
            beyond = torch.arange(rows) >= self._numbers[3, units, None]
            padding = _positions(beyond, past, (most + own_pages) * size)
            unused = beyond[:, :, None, None]
        index = self._pages(units, most, own_pages) if most or not full else None
        return _Run(units, index, past, hidden, padding, unused, self._visible(cached, past, units))

    def _pages(self, units: slice, most: int, own_pages: int) -> torch.Tensor:
        """int32 [n·(C + own pages)]; a page that is not wanted becomes the unit's last wanted one, still in cache."""
        counts = self._lengths[units]
        if not most:
            return torch.zeros(len(counts) * own_pages, dtype=torch.int32)
        wanted = self._page_table[units]
        if counts == self._prefix_pages[units] and min(counts) == most:
            wanted = wanted[:, :most]
            return torch.cat((wanted, wanted[:, -1:].expand(-1, own_pages)), dim=1).flatten()
        column = torch.arange(most + own_pages)
        count, first, page = self._numbers[4:, units, None].unbind()
        column = torch.minimum(column, (count - 1).clamp_(min=0))
        column = torch.where(column < first, column, column - first + page)
        # A unit without a page has no table entry that may be read.
        column = torch.where(count > 0, column, 0)
        return torch.where(count > 0, wanted.gather(1, column), 0).flatten()

    def _cached(self, units: slice, most: int) -> torch.Tensor:
        """bool [n, C·s]: which gathered positions are visible."""
        end, start, stop, _, count, first, page = self._numbers[:, units, None, None].unbind()
        column = torch.arange(most)[:, None]
        position = torch.where(column < first, column, column - first + page) * self.page_size
        position = position + torch.arange(self.page_size)
        visible = (position < end) | ((position >= start) & (position < stop))
        seen: torch.Tensor = (visible & (column < count)).flatten(1)
        return seen

    def _visible(self, cached: torch.Tensor | None, past: int, units: slice) -> torch.Tensor | None:
        """bool [1 or n, 1, r, c + r]; own rows of no unit, which are zero, are seen by rows of no unit only."""
        rows = self.num_rows
        if cached is None and self.own_block >= rows:
            return None
        block = torch.arange(rows) // self.own_block
        own = (block <= block[:, None])[None]
        if cached is None:
            return torch.cat((torch.ones(1, rows, past, dtype=torch.bool), own), dim=-1)[:, None]
        real = torch.arange(rows) < self._numbers[3, units, None]
        own = torch.where(real[:, :, None], own & real[:, None], True)
        return torch.cat((cached[:, None].expand(-1, rows, -1), own), dim=-1)[:, None]


def _positions(flags: torch.Tensor, first: int, stride: int) -> torch.Tensor | None:
    """int64 positions first + i + n·stride of the true flags [n, i]; None without any."""
    unit, position = flags.nonzero().unbind(1)
    return unit * stride + position + first if len(unit) else None


def gathered_attention(
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
    """`block_attention` with a plan for this call only."""
    plan = GatherPlan(
        page_table,
        prefix,
        suffix_start,
        suffix_end,
        own_len,
        own_block,
        num_rows=q.shape[1],
        page_size=key_pages.shape[1],
        width=q.shape[2] * q.shape[3],
    )
    return plan.attend(q, k, v, key_pages, value_pages)
