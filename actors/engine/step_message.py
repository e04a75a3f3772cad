"""A forward's layout as bytes: what a rank without canvases needs to know of it. Integers only, no pickle.

Shape legend as in `cache.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.actors.engine.cache import PackedAttention, PageStore, RowGroup, StaleRows

IntArray = NDArray[np.int64]
_NONE = -1


@dataclass(frozen=True, eq=False)
class Layout:
    """What stays while nothing moves: positions int64 [1, R], and what `PackedAttention` is made of."""

    positions: torch.Tensor
    groups: list[RowGroup]
    destination: torch.Tensor | None
    stale: StaleRows | None


class Writer:
    """Numbers one behind another."""

    def __init__(self) -> None:
        self._parts: list[IntArray] = []

    def number(self, *values: int) -> None:
        self._parts.append(np.array(values, np.int64))

    def array(self, tensor: torch.Tensor | None) -> None:
        """A tensor of integers, flat, with its length before it; None has the length -1."""
        if tensor is None:
            self.number(_NONE)
            return
        flat = tensor.detach().cpu().numpy().astype(np.int64).ravel()
        self.number(len(flat))
        self._parts.append(flat)

    def content(self) -> bytes:
        return np.concatenate(self._parts).tobytes()


class Reader:
    """Reads what a `Writer` wrote, in the same order."""

    def __init__(self, content: bytes) -> None:
        self._numbers: IntArray = np.frombuffer(content, np.int64)
        self._at = 0

    def take(self, count: int) -> IntArray:
        part = self._numbers[self._at : self._at + count]
        self._at += count
        return part

    def number(self) -> int:
        return int(self.take(1)[0])

    def rest(self) -> list[int]:
        return [int(value) for value in self._numbers[self._at :]]

    def array(self, dtype: type[Any] = np.int64) -> torch.Tensor | None:
        count = self.number()
        return None if count == _NONE else torch.from_numpy(self.take(count).astype(dtype))


def write_layout(writer: Writer, positions: torch.Tensor, attention: PackedAttention) -> None:
    """A forward's layout behind what the writer has."""
    stale = attention.stale
    writer.array(positions)
    writer.array(attention.destination)
    writer.array(None if stale is None else stale.rows)
    writer.array(None if stale is None else stale.owner)
    writer.number(0 if stale is None else stale.num_sequences, len(attention.groups))
    for group in attention.groups:
        keep = group.plan is not None and group.plan.keep
        writer.number(group.first_row, group.num_rows, group.own_block, group.bounds.shape[1], int(keep))
        writer.array(group.page_table)
        writer.array(group.bounds)


def read_layout(reader: Reader, store: PageStore) -> Layout:
    """What `write_layout` wrote, over this rank's own pages."""
    positions, destination, rows, owner = (reader.array() for _ in range(4))
    num_stale, num_groups = reader.number(), reader.number()
    groups = []
    for _ in range(num_groups):
        first_row, num_rows, own_block, count, keep = (int(value) for value in reader.take(5))
        table, bounds = reader.array(np.int32), reader.array(np.int32)
        assert table is not None
        assert bounds is not None
        groups.append(
            RowGroup.of(
                store, first_row, num_rows, own_block, table.view(count, -1), bounds.view(4, count), store.keys.device, bool(keep)
            )
        )  # fmt: skip
    assert positions is not None
    stale = None
    if rows is not None and owner is not None:
        stale = StaleRows(rows, owner, num_stale)
    return Layout(positions[None], groups, destination, stale)
