"""A random model of a few thousand weights that writes printable text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fewstep.kernels.model.checkpoint import save_model
from fewstep.kernels.model.config import AttentionKind, ModelConfig
from fewstep.kernels.model.transformer import Transformer

SPECIAL = ("<|mask|>", "<|eos|>", "<|pad|>")


def build_tokenizer() -> Tokenizer:
    """One token a printable ASCII character, so that any output is text."""
    symbols = [text for character in range(32, 127) for text, _ in _byte_level(chr(character))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *symbols])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def _byte_level(text: str) -> list[tuple[str, tuple[int, int]]]:
    found: list[tuple[str, tuple[int, int]]] = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(text)
    return found


def tiny_model(
    tokenizer: Tokenizer, context: int = 2048, attention_kind: AttentionKind = "block_causal"
) -> Transformer:
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        max_position_embeddings=context,
        attention_kind=attention_kind,
        block_size=8,
        mask_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = Transformer(config)
    model.initialise(3)
    return model.eval()


def save_tiny(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    model = tiny_model(tokenizer)
    save_model(folder, model.state_dict(), model.config, tokenizer)
    return folder
