"""Where each tensor of a bucket lies in one flat run of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT = 64  # bytes; a cache line, and enough for every dtype
BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Slot:
    """One tensor: dtype is torch's name without the module, such as `float32`; offset and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """The slots of one bucket and its size in bytes."""

    slots: tuple[Slot, ...]
    num_bytes: int

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> Layout:
        slots, offset = [], 0
        for name, tensor in state.items():
            size = tensor.numel() * tensor.element_size()
            slots.append(
                Slot(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, size)
            )
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(tuple(slots), offset)

    def write(self, state: Mapping[str, torch.Tensor], out: NDArray[np.uint8]) -> None:
        """Copy the tensors into `out`, uint8 [num_bytes]."""
        for slot in self.slots:
            raw = state[slot.name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            out[slot.offset : slot.offset + slot.num_bytes] = raw

    def read(self, raw: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        """Views of the tensors in writable bytes `raw`, uint8 [num_bytes]; no copy."""
        flat = torch.from_numpy(raw)
        return {
            slot.name: flat[slot.offset : slot.offset + slot.num_bytes]
            .view(getattr(torch, slot.dtype))
            .reshape(slot.shape)
            for slot in self.slots
        }


def packed_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors themselves, padding not counted."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def buckets(state: Mapping[str, torch.Tensor], limit: int = BUCKET_BYTES) -> list[dict[str, torch.Tensor]]:
    """Split into groups of at most `limit` bytes; a larger tensor is a group of its own."""
    groups: list[dict[str, torch.Tensor]] = []
    room = 0
    for name, tensor in state.items():
        size = -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        if not groups or size > room:
            groups.append({})
            room = limit
        groups[-1][name] = tensor
        room -= size
    return groups
