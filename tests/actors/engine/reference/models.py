"""Random tiny models that behave like models, and a tokenizer for them."""

from __future__ import annotations

import functools

import torch
from tests.kernels.device import DEVICE
from tokenizers import Tokenizer, decoders, models

from fewstep.actors.engine.engine import Engine
from fewstep.kernels.model.config import AttentionKind, ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.records import WeightVersion

MASK, EOS, PAD = 0, 1, 2
BLOCK, CONTEXT = 8, 64
# What `engine_of` gives its engines unless told otherwise; the fixture `both_ways_to_step` changes it.
STATIC_STEPS: bool | None = None
VERSION = WeightVersion("test", 0, "0" * 32)
# Half of the words have two characters, so that a stop string can begin inside a token.
WORDS = ["<|mask|>", "<|eos|>", "<|pad|>", *"abcdefghijklm", *(f"{c}{c.upper()}" for c in "nopqrstuvwxyz")]
WORDS += ["\n", " ", ".", ";"]


def build_model(seed: int = 0, kind: AttentionKind = "block_causal") -> Transformer:
    """Random weights turned up until they behave like a model: contexts matter, confidences spread over (0, 1),
    and a fair share of completions meets an end of sequence (test_reference.py)."""
    config = ModelConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        # Six positions more than whole blocks: a block-causal model cannot use them.
        max_position_embeddings=CONTEXT + 6 if kind == "block_causal" else CONTEXT,
        attention_kind=kind,
        block_size=BLOCK,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Transformer(config)
    # Of the first four seeds this one repeats itself least and ends most often.
    model.initialise(seed + 1)
    turn_up(model, sharpness=0.75)
    return model.eval()


def build_minute_model(
    kind: AttentionKind = "block_causal", vocab_size: int = 12, sharpness: float = 0.35, seed: int = 2
) -> Transformer:
    """One layer, blocks of 4: for tests that need many thousand forwards."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        max_position_embeddings=32,
        attention_kind=kind,
        block_size=4,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Transformer(config)
    model.initialise(seed)
    turn_up(model, sharpness)
    return model.eval()


def turn_up(model: Transformer, sharpness: float) -> None:
    """From nearly uniform predictions to sharp ones that depend on the context; ends of sequence made likelier."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(6.0)
            if name.endswith("q_norm.weight"):
                parameter.mul_(3.0)
        model.embed_tokens.weight.mul_(50.0)
        model.embed_tokens.weight[EOS] *= 1.5
        model.norm.weight.mul_(sharpness)


@functools.cache
def reference_model(kind: AttentionKind = "block_causal", seed: int = 0) -> Transformer:
    """The reference's own copy, shared because nothing writes into it: engines write weights into theirs."""
    return build_model(seed, kind)


def build_tokenizer(words: int = len(WORDS)) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS[:words])}, unk_token="<|pad|>")
    )
    tokenizer.add_special_tokens(["<|mask|>", "<|eos|>", "<|pad|>"])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def engine_of(
    max_sequences: int = 8, seed: int = 0, kind: AttentionKind = "block_causal", **settings: object
) -> Engine:
    """An engine over a model of its own; `settings` are further arguments of `Engine`."""
    return Engine(
        build_model(seed, kind).to(DEVICE),
        build_tokenizer(),
        max_sequences=max_sequences,
        weight_version=VERSION,
        **{"static_steps": STATIC_STEPS, **settings},  # type: ignore[arg-type]
    )


def token_bytes(config: ModelConfig) -> int:
    """Bytes of one position's float32 keys and values in all layers."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
