"""Where everything lies in a forward: what follows from its spans alone, and is kept while they stay as they are.

Between two blocks nothing of it changes, and those are most forwards: a single request of the embedded model spends a
third of its time here otherwise.

Shape legend: n sequences of a forward, m of them deciding, W widest live block of those, R packed rows, P pages,
s page size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.actors.engine.cache import PageStore, RowGroup, StaleRows
from fewstep.actors.engine.scheduler import Sequence, Span

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Index tensors of one forward.

    Attributes:
        key: the spans it was made of (see `key_of`); spans: the same in packed order.
        slots, positions: int64 [R], where each packed row comes from.
        groups: sequences with equally many rows.
        destination: int64 [R], flat position in the pages (page · s + offset), -1 for rows that are not kept; None = none.
        stale: rows that replace those of an approximate cache, and the index of the sequence each belongs to.
        deciding: sequences with a live block in this forward.
        live_slots: int64 [m]; live_positions: int64 [m, W], a sink column behind a block's end; live_rows: int64 [m, W], the
            packed rows that predict them.
        inside: bool [m, W], not behind a block's end; None = all are.
    """

    key: tuple[Any, ...]
    spans: list[Span]
    slots: torch.Tensor
    positions: torch.Tensor
    groups: list[RowGroup]
    destination: torch.Tensor | None
    stale: StaleRows | None
    deciding: list[Sequence]
    live_slots: torch.Tensor
    live_positions: torch.Tensor
    live_rows: torch.Tensor
    inside: torch.Tensor | None

    @property
    def reusable(self) -> bool:
        """Whether the next forward may have the same geometry: this one writes nothing that later ones read."""
        return self.destination is None


def key_of(spans: list[Span]) -> tuple[Any, ...]:
    """Equal keys of two forwards, one behind the other, mean equal geometry; sequences compare by identity."""
    return tuple(
        (s.sequence, s.first, s.end, s.keep, s.prefix, s.sequence.live, s.sequence.live_end) for s in spans
    )


def geometry_of(spans: list[Span], store: PageStore, sink: int, shift: int, device: torch.device) -> Geometry:
    """Lay out a forward; sequences with equally many rows, and among them with equally long a past, side by side.

    Args:
        sink: the column of the canvases that nobody reads.
        shift: how many rows before a position the row stands that predicts it (1 where logits are shifted).
    """
    key = key_of(spans)
    spans = sorted(spans, key=lambda span: (span.end - span.first, span.own_block, span.prefix))
    sizes = np.array([span.end - span.first for span in spans])
    starts = np.cumsum(sizes) - sizes
    owner = np.repeat(np.arange(len(spans)), sizes)
    first = np.array([span.first for span in spans])
    positions = np.arange(len(owner)) + (first - starts)[owner]
    slots = np.array([span.sequence.slot for span in spans])
    page_table = _page_table(spans)

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    deciding = [index for index, span in enumerate(spans) if span.decides]
    sequences = [spans[index].sequence for index in deciding]
    live = np.array([sequence.live for sequence in sequences], np.int64)
    width = np.array([sequence.live_end for sequence in sequences], np.int64) - live
    offset = np.arange(int(width.max(initial=0)))
    inside = offset < width[:, None]
    rows = (live - first[deciding] + starts[deciding] - shift)[:, None] + offset
    kept = positions < np.array([span.keep for span in spans])[owner]
    return Geometry(
        key=key,
        spans=spans,
        slots=tensor(slots[owner]),
        positions=tensor(positions),
        groups=_groups(spans, starts, page_table, store, device),
        destination=tensor(_destination(kept, owner, positions, page_table, store)) if kept.any() else None,
        stale=_stale(spans, owner, device),
        deciding=sequences,
        live_slots=tensor(np.array([sequence.slot for sequence in sequences], np.int64)),
        live_positions=tensor(np.where(inside, live[:, None] + offset, sink)),
        live_rows=tensor(rows),
        inside=None if inside.all() else tensor(inside),
    )


def _page_table(spans: list[Span]) -> NDArray[np.int32]:
    """int32 [n, most pages], 0 behind a sequence's own."""
    table = np.zeros((len(spans), max(1, *(len(span.sequence.pages) for span in spans))), np.int32)
    for row, span in zip(table, spans, strict=True):
        row[: len(span.sequence.pages)] = span.sequence.pages
    return table


def _destination(
    kept: NDArray[np.bool_],
    owner: IntArray,
    positions: IntArray,
    page_table: NDArray[np.int32],
    store: PageStore,
) -> IntArray:
    destination = np.full(len(owner), -1)
    page = page_table[owner[kept], positions[kept] // store.page_size].astype(np.int64)
    destination[kept] = page * store.page_size + positions[kept] % store.page_size
    return destination


def _groups(
    spans: list[Span],
    starts: IntArray,
    page_table: NDArray[np.int32],
    store: PageStore,
    device: torch.device,
) -> list[RowGroup]:
    groups, index = [], 0
    writes = any(span.keep > span.first for span in spans)
    for (num_rows, own_block), members in groupby(
        spans, key=lambda span: (span.end - span.first, span.own_block)
    ):
        group = list(members)
        some = slice(index, index + len(group))
        bounds = np.array([(s.prefix, s.suffix_start, s.suffix_end, num_rows) for s in group], np.int32).T
        groups.append(
            RowGroup.of(
                store,
                int(starts[index]),
                num_rows,
                own_block,
                torch.from_numpy(page_table[some]),
                torch.from_numpy(np.ascontiguousarray(bounds)),
                device,
                keep=not writes,
            )
        )
        index += len(group)
    return groups


def _stale(spans: list[Span], owner: IntArray, device: torch.device) -> StaleRows | None:
    refreshing = [index for index, span in enumerate(spans) if span.refreshes]
    if not refreshing:
        return None
    number = np.full(len(spans), -1)
    number[refreshing] = np.arange(len(refreshing))
    rows = np.flatnonzero(number[owner] >= 0)
    owners = torch.from_numpy(number[owner[rows]]).to(device)
    return StaleRows(torch.from_numpy(rows).to(device), owners, len(refreshing))
