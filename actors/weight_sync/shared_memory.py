"""Weights through anonymous shared memory: for replicas on the sender's node.

Each bucket is a memfd of the sender, opened by the receiver through /proc. Against a named segment
(multiprocessing.shared_memory): it vanishes with the sender however that ends, needs no tracker process in every
replica, and is not bound by the size of /dev/shm, which is 64 MB in many containers.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from fewstep.actors.weight_sync.base import WeightTransport
from fewstep.actors.weight_sync.layout import BUCKET_BYTES, Layout, buckets


@dataclass(frozen=True)
class Region:
    """One memfd of process `pid`; the inode tells it from whatever reuses the descriptor's number later."""

    pid: int
    descriptor: int
    inode: int
    layout: Layout

    @contextmanager
    def open(self) -> Iterator[dict[str, torch.Tensor]]:
        descriptor = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", os.O_RDONLY | os.O_NONBLOCK)
        try:
            if os.fstat(descriptor).st_ino != self.inode:
                raise FileNotFoundError("the push is over")
            # Private and writable: torch wants a writable buffer, and the sender's bytes stay its own.
            region = mmap.mmap(descriptor, self.layout.num_bytes, flags=mmap.MAP_PRIVATE)
        finally:
            os.close(descriptor)
        # Not closed by hand: the map goes with the last view of it.
        yield self.layout.read(np.frombuffer(region, np.uint8))


@dataclass(frozen=True)
class SharedMemoryPayload:
    """All buckets of one push."""

    regions: tuple[Region, ...]

    @contextmanager
    def open(self) -> Iterator[dict[str, torch.Tensor]]:
        with ExitStack() as stack:
            state: dict[str, torch.Tensor] = {}
            for region in self.regions:
                state |= stack.enter_context(region.open())
            yield state


class SharedMemoryTransport(WeightTransport):
    name = "shared_memory"

    def __init__(self, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__()
        self._bucket_bytes = bucket_bytes

    @contextmanager
    def publish(self, state: Mapping[str, torch.Tensor]) -> Iterator[SharedMemoryPayload]:
        with ExitStack() as stack:
            regions = []
            for bucket in buckets(state, self._bucket_bytes):
                descriptor = os.memfd_create("fewstep-weights", os.MFD_CLOEXEC)
                stack.callback(os.close, descriptor)
                layout = Layout.of(bucket)
                os.ftruncate(descriptor, layout.num_bytes)
                with mmap.mmap(descriptor, layout.num_bytes) as region:
                    out = np.frombuffer(region, np.uint8)
                    layout.write(bucket, out)
                    del out  # the map cannot be closed while a view of it lives
                regions.append(Region(os.getpid(), descriptor, os.fstat(descriptor).st_ino, layout))
            yield SharedMemoryPayload(tuple(regions))
