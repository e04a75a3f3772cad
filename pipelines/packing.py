"""Packing: documents of any length into sequences of a bounded length, no document cut that fits.

Best-fit packing (Ding et al., 2404.10830): a piece goes into the fullest open sequence that has room. A document is cut
only where it is longer than a whole sequence; its pieces begin at position 0 each, and no piece sees another.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

OPEN_SEQUENCES = 64
"""Sequences that wait for a piece; more waste less and hold more memory."""


@dataclass(frozen=True)
class Piece:
    """A document, or a stretch of one.

    Attributes:
        tokens: int32 [n].
        num_prompt: its first tokens that are context and not learned.
        document: number of the document among those of the unit.
        complete: the document ends here.
    """

    tokens: NDArray[np.int32]
    num_prompt: int
    document: int
    complete: bool


def cut(tokens: NDArray[np.int32], num_prompt: int, document: int, longest: int) -> Iterator[Piece]:
    """A document as pieces of at most `longest` tokens."""
    for start in range(0, len(tokens), longest):
        part = tokens[start : start + longest]
        prompt = min(len(part), max(0, num_prompt - start))
        yield Piece(part, prompt, document, start + longest >= len(tokens))


@dataclass
class Packer:
    """Packs a stream of pieces; what comes out depends on what went in, in which order, and on nothing else.

    Args:
        longest: tokens of a sequence.
    """

    longest: int
    _open: list[tuple[int, int]] = field(default_factory=list)
    _held: dict[int, list[Piece]] = field(default_factory=dict)
    _count: int = 0

    def add(self, piece: Piece) -> Iterator[list[Piece]]:
        """Place a piece; yields a sequence when one is full or has to make room."""
        need = len(piece.tokens)
        assert need <= self.longest
        at = bisect_left(self._open, (need, -1))  # the least room that is enough
        room, key = self._open.pop(at) if at < len(self._open) else (self.longest, self._new())
        self._held[key].append(piece)
        if room == need:
            yield self._held.pop(key)
            return
        insort(self._open, (room - need, key))
        if len(self._open) > OPEN_SEQUENCES:
            yield self._held.pop(self._open.pop(0)[1])

    def rest(self) -> Iterator[list[Piece]]:
        """The sequences that are still open, in the order in which they were begun."""
        for key in sorted(self._held):
            yield self._held.pop(key)
        self._open.clear()

    def _new(self) -> int:
        self._count += 1
        self._held[self._count] = []
        return self._count
