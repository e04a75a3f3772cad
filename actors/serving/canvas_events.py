"""Canvases as the `diffusing` streams show them (docs/serving.md, Streams)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from fewstep.actors.engine.request import CanvasView
from fewstep.actors.engine.text import decode, find_stop

# Tokens before a block that its texts are decoded behind, and tokens decoded together: decoders treat a text's first token in their own way.
_CONTEXT, _PIECE = 8, 32
# What a byte-level decoder shows for bytes that are no character yet.
_INCOMPLETE = "�"


def canvas_fields(tokenizer: Tokenizer, view: CanvasView) -> dict[str, Any]:
    """The JSON object `fewstep.canvas` of a chunk."""
    tokens = [
        {"text": text, "state": "mask" if not text and state == "provisional" else state}
        for text, state in zip(
            piece_texts(tokenizer, view.ids, view.before[-_CONTEXT:]), view.states, strict=True
        )
    ]
    return {"revision": view.revision, "start": view.start, "tokens": tokens}


def whole_text(tokenizer: Tokenizer, view: CanvasView, stop: Sequence[str]) -> str:
    """Committed and provisional text of an answer, up to a stop string."""
    text = decode(tokenizer, [*view.before, *view.ids])
    return text[: find_stop(text, stop)]


def piece_texts(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text that each token adds to those before it; special tokens add none.

    A character of several tokens is the text of the last of them; what is no character in the end is shown as one `�`.
    """
    texts: list[str] = []
    # Piece by piece, each behind a few tokens: decoding all that comes before every token would be quadratic.
    for first in range(0, len(ids), _PIECE):
        context = [*before, *ids[max(0, first - _CONTEXT) : first]][-_CONTEXT:]
        shown = len(decode(tokenizer, context).rstrip(_INCOMPLETE))
        for end in range(first + 1, min(first + _PIECE, len(ids)) + 1):
            text = decode(tokenizer, [*context, *ids[first:end]])
            # A run of bytes at the end may become a character with the next token; the last token leaves it at that.
            whole = text if end == len(ids) else text.rstrip(_INCOMPLETE)
            texts.append(text[shown : len(whole)])
            shown = max(shown, len(whole))
    return texts
