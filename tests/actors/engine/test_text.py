"""Pieces of text: never taken back, whole characters, stop strings wherever they fall."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fewstep.actors.engine.text import TextStream, decode


def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that characters beyond ASCII come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()


def feed_all(text: str, stop: tuple[str, ...], sizes: list[int]) -> tuple[list[str], int, bool]:
    """Pieces, token count and whether it stopped, when the tokens of `text` come `sizes` at a time."""
    ids = TOKENIZER.encode(text).ids
    stream, pieces, end, turn = TextStream(TOKENIZER, stop), [], 0, 0
    while True:
        end = min(len(ids), end + sizes[turn % len(sizes)])
        piece = stream.feed(ids[:end], end, last=end == len(ids))
        pieces.append(piece.text)
        turn += 1
        if piece.stopped or end == len(ids):
            return pieces, piece.num_tokens, piece.stopped


@example(text="aéa", stop=["é", "aéa"], sizes=[1])
@given(
    text=st.text(alphabet="abé€\n", max_size=30),
    stop=st.lists(st.text(alphabet="abé\n", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_pieces_join_to_the_text_before_the_first_stop_string(
    text: str, stop: list[str], sizes: list[int]
) -> None:
    pieces, num_tokens, stopped = feed_all(text, tuple(stop), sizes)
    found = [index for string in stop if (index := text.find(string)) >= 0]
    expected = text[: min(found)] if found else text
    assert "".join(pieces) == expected
    assert stopped == bool(found)
    assert num_tokens == len(expected.encode())


def test_a_character_is_held_back_until_its_last_byte() -> None:
    pieces, _, _ = feed_all("a€b", (), [1])
    assert pieces == ["a", "", "", "€", "b"]


def test_what_may_become_a_stop_string_is_held_back_and_released() -> None:
    assert feed_all("x\n\ny", ("\n\n\n",), [1])[0] == ["x", "", "", "\n\ny"]
    assert feed_all("x\n\n\ny", ("\n\n\n",), [1]) == (["x", "", "", ""], 1, True)
    assert feed_all("x\n", ("\n\n",), [1]) == (["x", "\n"], 2, False)


def test_a_decoder_that_rewrites_is_an_error_not_a_wrong_stream() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    assert decode(tokenizer, [0, 1]) == "c"
    stream = TextStream(tokenizer, ())
    stream.feed([0], 1, last=False)
    with pytest.raises(ValueError, match="rewrites earlier text"):
        stream.feed([0, 1], 2, last=False)
