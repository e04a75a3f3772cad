"""Weights through Ray's object store: for replicas on other nodes, where Ray moves each bucket once per node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewstep.actors.weight_sync.base import WeightTransport
from fewstep.actors.weight_sync.layout import BUCKET_BYTES, Layout, buckets


@dataclass(frozen=True)
class ObjectStorePayload:
    """Buckets as object references; kept inside a dataclass so that Ray does not resolve them in the call."""

    parts: tuple[tuple[Layout, Any], ...]

    @contextmanager
    def open(self) -> Iterator[dict[str, torch.Tensor]]:
        import ray

        state: dict[str, torch.Tensor] = {}
        for layout, reference in self.parts:
            state |= layout.read(
                ray.get(reference).copy()
            )  # the store's bytes are read-only, torch's are not
        yield state


class ObjectStoreTransport(WeightTransport):
    name = "object_store"

    def __init__(self, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__()
        self._bucket_bytes = bucket_bytes

    @contextmanager
    def publish(
        self, state: Mapping[str, torch.Tensor], num_receivers: int, limit_s: float
    ) -> Iterator[ObjectStorePayload]:
        import ray

        parts = []
        for bucket in buckets(state, self._bucket_bytes):
            layout = Layout.of(bucket)
            out = np.zeros(layout.num_bytes, np.uint8)
            layout.write(bucket, out)
            parts.append((layout, ray.put(out)))
        yield ObjectStorePayload(tuple(parts))
