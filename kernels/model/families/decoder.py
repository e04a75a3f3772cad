"""Llama, Qwen2, Qwen3, and the diffusion models that grew out of them and kept their names and fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fewstep.kernels.model.config import NO_TOKEN, ModelConfig
from fewstep.kernels.model.families.family import Family, Fields, Piece
from fewstep.kernels.model.families.names import tensor_names
from fewstep.platform.errors import CheckpointError


def decoder_pieces(config: ModelConfig) -> Iterator[Piece]:
    """Hugging Face's names: everything below `model.`, the head beside it."""
    for name in tensor_names(config):
        yield Piece(name if name.startswith("lm_head.") else f"model.{name}", name)


def decoder_fields(fields: Fields) -> dict[str, Any]:
    """What Llama, Qwen2 and Qwen3 spell alike.

    transformers 5 writes `dtype` for `torch_dtype` and gathers the rotary fields in `rope_parameters`.
    """
    fields.only(hidden_act="silu", use_sliding_window=False, pretraining_tp=1)
    layer_types = set(fields.get("layer_types", ()))
    if layer_types - {"full_attention"}:
        raise CheckpointError(
            f"{fields.where}: layer_types",
            sorted(layer_types),
            "full_attention",
            "use a model without windows",
        )
    heads = fields["num_attention_heads"]
    eos = first_id(fields["eos_token_id"])
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_hidden_layers": fields["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads", heads),
        "head_dim": fields.get("head_dim", fields["hidden_size"] // heads),
        "intermediate_size": fields["intermediate_size"],
        "max_position_embeddings": fields["max_position_embeddings"],
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-6),
        **rope_fields(fields, default_partial=1.0),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        "embedding_norm": False,
        "eos_token_id": eos,
        "pad_token_id": first_id(fields.get("pad_token_id", eos)),
    }


def rope_fields(fields: Fields, default_partial: float) -> dict[str, Any]:
    """Base, scaling and rotated share; `default_partial` is the family's share where the file states none."""
    rope = fields.get("rope_parameters") or {}
    return {
        "rope_theta": rope.get("rope_theta") or fields.get("rope_theta", 10_000.0),
        "rope_scaling": _rope_scaling(fields, rope or fields.get("rope_scaling") or {}),
        "partial_rotary_factor": rope.get("partial_rotary_factor")
        or fields.get("partial_rotary_factor", default_partial),
    }


def first_id(value: int | list[int]) -> int:
    """Several ends of sequence are common; the first is the one that fills what lies behind an end."""
    return value[0] if isinstance(value, list) else value


def _rope_scaling(fields: Fields, values: dict[str, Any]) -> dict[str, Any] | None:
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    names = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"),
    }
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *names.get(kind, ())}
    surplus = sorted(name for name in values.keys() - known if values[name] is not None)
    if kind not in names or surplus:
        raise CheckpointError(
            f"{fields.where}: rope_scaling",
            f"{kind} with {surplus}" if kind in names else kind,
            f"one of {', '.join(names)} with the keys of their papers",
            "use a checkpoint without it",
        )
    given = {name: values[name] for name in names[kind] if values.get(name) is not None}
    if kind == "yarn":
        given.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    return {"kind": kind, **given}


def _llama(fields: Fields) -> dict[str, Any]:
    bias = fields.get("attention_bias", False)
    return decoder_fields(fields) | {
        "qk_norm": False,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": fields.get("mlp_bias", False),
    }


def _qwen2(fields: Fields) -> dict[str, Any]:
    fields.only(use_mrope=False)
    return decoder_fields(fields) | {"qk_norm": False, "qkv_bias": True}


def _qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.get("attention_bias", False)
    return decoder_fields(fields) | {
        "head_dim": fields.get("head_dim", 128),
        "qkv_bias": bias,
        "output_bias": bias,
    }


def _causal(fields: dict[str, Any]) -> dict[str, Any]:
    """What makes a source autoregressive: each row sees itself and what is before, and predicts the next token."""
    return fields | {
        "attention_kind": "causal",
        "block_size": 1,
        "logit_shift": True,
        "mask_token_id": NO_TOKEN,
    }


def _sdar(fields: Fields) -> dict[str, Any]:
    return _qwen3(fields) | {
        "attention_kind": "block_causal",
        "block_size": fields.get("block_size", 4),
        "mask_token_id": fields["mask_token_id"],
    }


def _dream(fields: Fields) -> dict[str, Any]:
    return _qwen2(fields) | {
        "attention_kind": "bidirectional",
        "block_size": _BIDIRECTIONAL_BLOCK_SIZE,
        "logit_shift": True,
        "mask_token_id": fields["mask_token_id"],
    }


def _fast_dllm_v2(fields: Fields) -> dict[str, Any]:
    return _qwen2(fields) | {
        "attention_kind": "block_causal",
        "block_size": fields["bd_size"],
        "logit_shift": True,
        # The released config.json has no such key; its modelling code has this default.
        "mask_token_id": fields.get("mask_token_id", 151665),
    }


def _stable_diffcoder(fields: Fields) -> dict[str, Any]:
    return _llama(fields) | {
        "attention_kind": "block_causal",
        # Neither is in the released config.json: the tokenizer's `<[MASK_TOKEN]>` and the model card's block length.
        "block_size": fields.get("block_size", 4),
        "mask_token_id": fields.get("mask_token_id", 5),
    }


# Answers are denoised in blocks of this many tokens unless a policy says otherwise; training knows no blocks.
_BIDIRECTIONAL_BLOCK_SIZE = 32
_HEAD = "lm_head.weight"

LLAMA = Family(
    "llama", "llama", ("LlamaForCausalLM",), lambda f: _causal(_llama(f)), decoder_pieces, head_name=_HEAD
)
QWEN2 = Family(
    "qwen2", "qwen2", ("Qwen2ForCausalLM",), lambda f: _causal(_qwen2(f)), decoder_pieces, head_name=_HEAD
)
QWEN3 = Family(
    "qwen3", "qwen3", ("Qwen3ForCausalLM",), lambda f: _causal(_qwen3(f)), decoder_pieces, head_name=_HEAD
)
# SDAR (2510.06303): Qwen3 continued as a block-diffusion model, a token predicted at its own position.
SDAR = Family("sdar", "sdar", ("SDARForCausalLM",), _sdar, decoder_pieces, head_name=_HEAD)
# Dream 7B (2508.15487) and DiffuCoder (2506.20639): Qwen2.5 made bidirectional, the shift kept.
DREAM = Family("dream", "Dream", ("DreamModel",), _dream, decoder_pieces, head_name=_HEAD)
# Fast-dLLM v2 (2509.26328): Qwen2.5 continued as a block-diffusion model, the shift kept.
FAST_DLLM_V2 = Family(
    "fast_dllm_v2",
    "Fast_dLLM_Qwen",
    ("Fast_dLLM_QwenForCausalLM",),
    _fast_dllm_v2,
    decoder_pieces,
    head_name=_HEAD,
)
# Stable-DiffCoder (2601.15892): Seed-Coder's Llama continued as a block-diffusion model, same-position logits.
STABLE_DIFFCODER = Family(
    "stable_diffcoder",
    "llama",
    ("StableDiffcoderForCausalLM",),
    _stable_diffcoder,
    decoder_pieces,
    head_name=_HEAD,
)

DECODER_FAMILIES = (LLAMA, QWEN2, QWEN3, SDAR, DREAM, FAST_DLLM_V2, STABLE_DIFFCODER)
