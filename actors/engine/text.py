"""Append-only text from a growing run of committed tokens, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

# What a byte-level decoder shows for a character whose bytes have not all come.
_INCOMPLETE = "�"


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def find_stop(text: str, stop: Sequence[str], start: int = 0) -> int | None:
    """Where the earliest stop string begins at or after `start`."""
    found = [index for string in stop if (index := text.find(string, start)) >= 0]
    return min(found, default=None)


def _num_held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that later tokens may change or turn into a stop string."""
    whole = text.rstrip(_INCOMPLETE)
    longest = 0
    for string in stop:
        for size in range(min(len(string) - 1, len(whole)), longest, -1):
            if whole.endswith(string[:size]):
                longest = size
                break
    return len(text) - len(whole) + longest


@dataclass(frozen=True)
class Piece:
    """Newly final text, the count of tokens final so far, and whether a stop string ended it."""

    text: str
    num_tokens: int
    stopped: bool


class TextStream:
    """Turns the contiguous committed prefix of one request into pieces of text that are never taken back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._emitted = ""
        self._num_tokens = 0

    def feed(self, ids: Sequence[int], num_tokens: int, last: bool) -> Piece:
        """Text that became final.

        Args:
            ids: every committed token up to the first mask, the end of sequence excluded.
            num_tokens: what `ids` count for, the end of sequence included.
            last: nothing will follow, so nothing is held back.
        Raises:
            ValueError: the tokenizer's decoder changed text that was already given out.
        """
        text = decode(self._tokenizer, ids)
        start = len(self._emitted)
        if not text.startswith(self._emitted):
            raise ValueError("the tokenizer's decoder rewrites earlier text, so it cannot be streamed")
        end = len(text) if last else max(start, len(text) - _num_held_back(text, self._stop))
        cut = find_stop(text, self._stop, start)
        # A stop string that begins earlier may still be under way: it wins once it is whole.
        if cut is not None and cut <= end:
            self._emitted = text[:cut]
            return Piece(text[start:cut], self._tokens_before(ids, cut), True)
        self._emitted = text[:end]
        if end == len(text):
            # Counted only once all their text is out: a stop string can no longer take them back.
            self._num_tokens = num_tokens
        return Piece(text[start:end], self._num_tokens, False)

    def _tokens_before(self, ids: Sequence[int], cut: int) -> int:
        """The most leading tokens whose text ends at or before character `cut`."""
        count = len(ids)
        while count and len(decode(self._tokenizer, ids[:count])) > cut:
            count -= 1
        return count
