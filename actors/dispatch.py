"""How a list of work is cut for workers so that they finish together, and what is run again. Pure, no Ray.

Factoring (Hummel, Schonberg and Flynn, CACM 35(8), 1992): each wave hands out a fixed share of what remains in
equal chunks, one per worker, so chunks shrink and the last ones even out differences in speed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# With two workers, the first wave gives each a third: exactly the fair share of one that is half as fast as the
# other, so up to that ratio nobody is still at its first chunk when the rest is done.
WAVE_SHARE = 2 / 3


@dataclass(frozen=True)
class Chunk:
    """Items `start` to `stop` (exclusive), handed out `tries` times before."""

    start: int
    stop: int
    tries: int = 0


def wave_sizes(num_items: int, num_workers: int, min_chunk: int) -> list[int]:
    """Chunk sizes, largest first, that add up to `num_items`."""
    sizes: list[int] = []
    left = num_items
    while left:
        size = max(min_chunk, math.ceil(left * WAVE_SHARE / num_workers))
        for _ in range(num_workers):
            sizes.append(min(size, left))
            left -= sizes[-1]
            if not left:
                break
    return sizes


class Dispatch:
    """Chunks that wait, and who holds which.

    Args:
        num_items: length of the work list.
        num_workers: workers there are at the start; fewer or more may come for chunks.
        min_chunk: no chunk is smaller, except the last.
        max_tries: a chunk whose workers died that often is given up.
    """

    def __init__(self, num_items: int, num_workers: int, *, min_chunk: int = 8, max_tries: int = 3) -> None:
        self._waiting: deque[Chunk] = deque()
        self._held: dict[str, Chunk] = {}
        self._max_tries = max_tries
        start = 0
        for size in wave_sizes(num_items, max(1, num_workers), min_chunk):
            self._waiting.append(Chunk(start, start + size))
            start += size

    @property
    def finished(self) -> bool:
        return not self._waiting and not self._held

    @property
    def busy(self) -> Sequence[str]:
        """Workers that hold a chunk."""
        return list(self._held)

    def take(self, worker: str) -> Chunk | None:
        """The next chunk for an idle worker; None if none waits."""
        if worker in self._held:
            raise ValueError(f"{worker} holds a chunk already")
        if not self._waiting:
            return None
        chunk = self._held[worker] = self._waiting.popleft()
        return chunk

    def done(self, worker: str) -> Chunk:
        """The worker's chunk is answered."""
        return self._held.pop(worker)

    def lost(self, worker: str) -> bool:
        """The worker died; its chunk, if any, goes first in the queue. False if that chunk is given up."""
        chunk = self._held.pop(worker, None)
        if chunk is None:
            return True
        if chunk.tries + 1 >= self._max_tries:
            return False
        self._waiting.appendleft(Chunk(chunk.start, chunk.stop, chunk.tries + 1))
        return True
