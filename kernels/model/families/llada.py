"""LLaDA-8B and LLaDA 1.5 (2502.09992): Llama-like, bidirectional, a token predicted at its own position.

The format is OLMo's with a gated MLP: `ff_proj` is the gate, `ff_out` the way down, and the head is called `ff_out` too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.families.family import Family, Fields, Piece
from fewstep.kernels.model.families.names import tensor_names

# Answers are denoised in blocks of this many tokens unless a policy says otherwise; training knows no blocks.
_DEFAULT_BLOCK_SIZE = 32

_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_TOP = {"embed_tokens": "wte", "norm": "ln_f", "lm_head": "ff_out"}


def _read(fields: Fields) -> dict[str, Any]:
    fields.only(
        block_type="llama", layer_norm_type="rms", activation_type="silu", alibi=False, rope=True,
        attention_layer_norm=False, input_emb_norm=False, layer_norm_with_affine=True, bias_for_layer_norm=False,
        include_bias=False, scale_logits=False, block_group_size=1, multi_query_attention=False,
        rope_full_precision=True,
    )  # fmt: skip
    heads = fields["n_heads"]
    return {
        "vocab_size": fields.get("embedding_size") or fields["vocab_size"],
        "hidden_size": fields["d_model"],
        "num_hidden_layers": fields["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("n_kv_heads", heads),
        "head_dim": fields["d_model"] // heads,
        "intermediate_size": fields.get("mlp_hidden_size") or fields["mlp_ratio"] * fields["d_model"],
        "max_position_embeddings": fields["max_sequence_length"],
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        "rope_theta": fields.get("rope_theta", 10_000.0),
        "tie_word_embeddings": fields.get("weight_tying", True),
        "qkv_bias": fields.get("include_qkv_bias", False),
        "embedding_norm": False,
        "qk_norm": False,
        "attention_kind": "bidirectional",
        "block_size": _DEFAULT_BLOCK_SIZE,
        "mask_token_id": fields["mask_token_id"],
        "eos_token_id": fields["eos_token_id"],
        "pad_token_id": fields.get("pad_token_id", fields["eos_token_id"]),
    }


def _pieces(config: ModelConfig) -> Iterator[Piece]:
    for name in tensor_names(config):
        module, _, kind = name.rpartition(".")
        if module in _TOP:
            yield Piece(f"model.transformer.{_TOP[module]}.{kind}", name)
        else:
            _, layer, inner = module.split(".", 2)
            yield Piece(f"model.transformer.blocks.{layer}.{_MODULES[inner]}.{kind}", name)


LLADA = Family("llada", "llada", ("LLaDAModelLM",), _read, _pieces)
