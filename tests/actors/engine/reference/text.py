"""Stop strings by definition, on the whole text every time."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer


def final_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def certain_stop(text: str, stop: Sequence[str], last: bool) -> int | None:
    """Where `text` is cut, once that is certain.

    It is cut where the earliest stop string begins. That is not certain yet while a character before it might
    begin another stop string, one that `text` holds only the beginning of; at the end (`last`) nothing more comes.
    """
    begins = [text.find(string) for string in stop if string in text]
    if not begins:
        return None
    cut = min(begins)
    pending = [
        begin for begin in range(cut) for string in stop if string.startswith(text[begin:]) and not last
    ]
    return None if pending else cut


def tokens_before(tokenizer: Tokenizer, ids: Sequence[int], cut: int) -> int:
    """The most leading tokens whose text ends at or before character `cut`."""
    return max(n for n in range(len(ids) + 1) if len(final_text(tokenizer, ids[:n])) <= cut)
