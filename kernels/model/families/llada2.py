"""LLaDA2.0 and 2.1 (2512.15745, 2602.08676): a Ling-2.0 mixture of experts, block diffusion, same-position logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.families.decoder import first_id, rope_fields
from fewstep.kernels.model.families.family import Family, Fields, Piece
from fewstep.kernels.model.families.names import tensor_names

# What the released generation code uses; config.json states neither.
_MASK_TOKEN_ID = 156895
_BLOCK_SIZE = 32

_MODULES = {
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "mlp.router": "mlp.gate",
}


def _read(fields: Fields) -> dict[str, Any]:
    fields.only(
        hidden_act="silu", use_qk_norm=True, norm_head=False, use_sliding_window=False, score_function="sigmoid",
        norm_topk_prob=True, num_nextn_predict_layers=0,
    )  # fmt: skip
    heads = fields["num_attention_heads"]
    eos = first_id(fields.get("eos_token_id", fields["pad_token_id"]))
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_hidden_layers": fields["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["num_key_value_heads"],
        "head_dim": fields.get("head_dim", fields["hidden_size"] // heads),
        "intermediate_size": fields["intermediate_size"],
        "max_position_embeddings": fields.get("max_position_embeddings", 16384),
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        **rope_fields(fields, default_partial=0.5),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        "embedding_norm": False,
        "qkv_bias": fields.get("use_qkv_bias", False),
        "output_bias": fields.get("use_bias", True),
        "moe": {
            "num_experts": fields["num_experts"],
            "num_experts_per_tok": fields["num_experts_per_tok"],
            "moe_intermediate_size": fields["moe_intermediate_size"],
            "num_shared_experts": fields.get("num_shared_experts", 0),
            "first_k_dense_replace": fields.get("first_k_dense_replace", 0),
            "n_group": fields.get("n_group", 8),
            "topk_group": fields.get("topk_group", 4),
            "routed_scaling_factor": fields.get("routed_scaling_factor", 2.5),
        },
        "attention_kind": "block_causal",
        "block_size": fields.get("block_size", _BLOCK_SIZE),
        "mask_token_id": fields.get("mask_token_id", _MASK_TOKEN_ID),
        "eos_token_id": eos,
        "pad_token_id": first_id(fields["pad_token_id"]),
    }


def _pieces(config: ModelConfig) -> Iterator[Piece]:
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    first_row = {"q_proj": 0, "k_proj": heads * size, "v_proj": (heads + kv_heads) * size}
    for name in tensor_names(config):
        if name == "embed_tokens.weight":
            yield Piece("model.word_embeddings.weight", name)
        elif not name.startswith("layers."):
            yield Piece(name if name.startswith("lm_head.") else f"model.{name}", name)
        else:
            yield from _layer_pieces(config, name, first_row)


def _layer_pieces(config: ModelConfig, name: str, first_row: dict[str, int]) -> Iterator[Piece]:
    _, layer, inner = name.split(".", 2)
    prefix = f"model.layers.{layer}"
    module, _, kind = inner.rpartition(".")
    last = module.rpartition(".")[2]
    if last in first_row:
        yield Piece(f"{prefix}.attention.query_key_value.{kind}", name, first_row=first_row[last])
    elif module == "mlp.experts":
        assert config.moe is not None
        for expert in range(config.moe.num_experts):
            yield Piece(f"{prefix}.mlp.experts.{expert}.{kind}.weight", name, index=expert)
    elif inner == "mlp.router.bias":
        yield Piece(f"{prefix}.mlp.gate.expert_bias", name)
    else:
        renamed = _MODULES.get(module, module.replace("mlp.shared.", "mlp.shared_experts."))
        yield Piece(f"{prefix}.{renamed}.{kind}", name)


LLADA2 = Family("llada2", "llada2_moe", ("LLaDA2MoeModelLM",), _read, _pieces)
