"""The embedded model's vocabulary: one token per word of the family, and bytes for everything else.

A byte-level BPE without merges: a known word is one token, any other text falls back to its bytes, so every
prompt round-trips exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from fewstep.pipelines.tasks.family import draw_specification, render_body
from fewstep.platform.rng import generator

PAD, EOS, MASK = "<|pad|>", "<|eos|>", "<|mask|>"
SPECIAL = (PAD, EOS, MASK)
PAD_ID, EOS_ID, MASK_ID = range(len(SPECIAL))
# Indentation, triple quotes, two-character operators, optionally spaced words, digits, any other character.
WORD_PATTERN = r'\n *|"""| ?(?:==|!=|\*\*)|\[\]|\):| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z0-9_]|\s'


def build_tokenizer() -> Tokenizer:
    """The tokenizer, the same on every call: special tokens, 256 bytes, then the family's words in order."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(symbol, len(vocabulary))
    for word in _family_words():
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _family_words() -> list[str]:
    """Every distinct word of a fixed, large draw of prompts and bodies (byte-level spelling, sorted)."""
    splitter, draws = _splitter(), generator("vocabulary")
    words: set[str] = set()
    for _ in range(4000):
        specification = draw_specification(draws)
        for text in (specification.prompt, render_body(specification, draws)):
            words.update(word for word, _ in splitter.pre_tokenize_str(text))
    return sorted(words)


def family_ids(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """int64 ids of the family's words: what an edit may write."""
    return np.array([tokenizer.token_to_id(word) for word in _family_words()], np.int64)


def encode_pair(tokenizer: Tokenizer, prompt: str, body: str) -> tuple[NDArray[np.int64], int]:
    """Token ids of prompt + body + end of sequence (int64) and the number of prompt tokens."""
    prompt_ids = tokenizer.encode(prompt).ids
    body_ids = tokenizer.encode(body).ids
    return np.array([*prompt_ids, *body_ids, EOS_ID], np.int64), len(prompt_ids)
