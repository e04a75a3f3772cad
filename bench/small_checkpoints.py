"""Small random checkpoints in every public format, tensor by tensor as the format spells them.

The names and shapes here are written from the formats' own modelling code, not from `kernels/model/families`, so that
loading one of these folders tests the map and does not mirror it. Tokens: a padding, an end, a mask, then characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PAD, EOS, MASK = 0, 1, 2
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|mask|>")
CHARACTERS = ("\n", *map(chr, range(32, 127)))
# More rows than the tokenizer has tokens, as every released embedding has.
VOCAB_SIZE = 112
SHARD_TENSORS = 9

_TOKENS = {"eos_token_id": EOS, "pad_token_id": PAD, "mask_token_id": MASK}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_cache": False,
    "transformers_version": "4.46.2",
}
_QWEN2 = _DECODER | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llada": {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "activation_type": "silu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 64,
        "embedding_dropout": 0.0,
        "embedding_size": VOCAB_SIZE,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": "meta",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "max_sequence_length": 128,
        "mlp_hidden_size": 80,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 10000.0,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": VOCAB_SIZE,
        "weight_tying": False,
        **_TOKENS,
    },
    "dream": _QWEN2 | {"architectures": ["DreamModel"], "model_type": "Dream", "use_mrope": False, **_TOKENS},
    "sdar": _DECODER
    | {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        "head_dim": 16,
        "block_size": 4,
        "fuse_cross_entropy": True,
        "sliding_window": None,
        "use_sliding_window": False,
        **_TOKENS,
    },
    "fast_dllm_v2": _QWEN2
    | {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "model_type": "Fast_dLLM_Qwen",
        "bd_size": 8,
        "layer_types": ["full_attention"] * 2,
        "tie_word_embeddings": True,
        **_TOKENS,
    },
    "llada2": _DECODER
    | {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "partial_rotary_factor": 0.5,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "norm_head": False,
        "block_size": 8,
        **_TOKENS,
    },
    "stable_diffcoder": _DECODER
    | {
        "architectures": ["StableDiffcoderForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        **_TOKENS,
    },
    "llama": _DECODER
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "rope_scaling": _LLAMA3_ROPE,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    },
    "qwen2": _QWEN2
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    },
    "qwen3": _QWEN2
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 16,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    },
}

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this config.json, in the order of its layers."""
    kinds = {"llada": _llada_shapes, "llada2_moe": _llada2_shapes}
    return dict(kinds.get(config["model_type"], _decoder_shapes)(config))


def random_tensors(config: Mapping[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of a size at which context matters and confidences spread; norms near 1, biases near 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("expert_bias"):
            tensors[name] = noise * 0.05  # stays float32, as in the released files
        elif len(shape) == 1:
            tensors[name] = (0.1 * noise + (0.0 if name.endswith("bias") else 1.0)).to(dtype)
        else:
            tensors[name] = (noise * 1.5 * shape[1] ** -0.5).to(dtype)
    return tensors


def small_tokenizer() -> Tokenizer:
    """One token a character."""
    tokens = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=SPECIAL_TOKENS[PAD]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def write_small(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sharded: bool = True,
) -> Path:
    """Write a checkpoint folder: config.json, weights in one file or several, tokenizer, generation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(content, indent=4, sort_keys=True) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS]}) + "\n")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    write_weights(folder, random_tensors(config, seed, dtype), sharded)
    return folder


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], sharded: bool) -> None:
    """Weights as Hugging Face lays them out: one file, or shards of a few tensors with an index."""
    names = list(tensors)
    groups: Sequence[list[str]] = [names]
    if sharded:
        groups = [names[i : i + SHARD_TENSORS] for i in range(0, len(names), SHARD_TENSORS)]
    weight_map = {}
    for index, group in enumerate(groups):
        file = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" if sharded else "model.safetensors"
        save_file({name: tensors[name] for name in group}, str(folder / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, file))
    if sharded:
        size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        index_content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_content, indent=2) + "\n")


def _decoder_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    biased = config["model_type"] in ("qwen2", "Dream", "Fast_dLLM_Qwen")
    normed = config["model_type"] in ("qwen3", "sdar")
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, hidden)
            if biased:
                yield f"{at}.self_attn.{name}_proj.bias", (rows,)
        yield f"{at}.self_attn.o_proj.weight", (hidden, queries)
        if normed:
            yield f"{at}.self_attn.q_norm.weight", (size,)
            yield f"{at}.self_attn.k_norm.weight", (size,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _llada_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, inner, vocab = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    keys = hidden // config["n_heads"] * config["n_kv_heads"]
    yield "model.transformer.wte.weight", (vocab, hidden)
    for layer in range(config["n_layers"]):
        at = f"model.transformer.blocks.{layer}"
        yield f"{at}.attn_norm.weight", (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys), ("attn_out", hidden)):
            yield f"{at}.{name}.weight", (rows, hidden)
        yield f"{at}.ff_norm.weight", (hidden,)
        yield f"{at}.ff_proj.weight", (inner, hidden)
        yield f"{at}.up_proj.weight", (inner, hidden)
        yield f"{at}.ff_out.weight", (hidden, inner)
    yield "model.transformer.ln_f.weight", (hidden,)
    if not config["weight_tying"]:
        yield "model.transformer.ff_out.weight", (vocab, hidden)


def _llada2_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, size, vocab = config["hidden_size"], config["head_dim"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "model.word_embeddings.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.attention.query_key_value.weight", ((heads + 2 * kv_heads) * size, hidden)
        yield f"{at}.attention.query_layernorm.weight", (size,)
        yield f"{at}.attention.key_layernorm.weight", (size,)
        yield f"{at}.attention.dense.weight", (hidden, heads * size)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp_shapes(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{at}.mlp.gate.weight", (config["num_experts"], hidden)
        yield f"{at}.mlp.gate.expert_bias", (config["num_experts"],)
        inner = config["moe_intermediate_size"]
        for expert in range(config["num_experts"]):
            yield from _mlp_shapes(f"{at}.mlp.experts.{expert}", hidden, inner)
        yield from _mlp_shapes(f"{at}.mlp.shared_experts", hidden, inner * config["num_shared_experts"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _mlp_shapes(at: str, hidden: int, inner: int) -> Shapes:
    yield f"{at}.gate_proj.weight", (inner, hidden)
    yield f"{at}.up_proj.weight", (inner, hidden)
    yield f"{at}.down_proj.weight", (hidden, inner)
