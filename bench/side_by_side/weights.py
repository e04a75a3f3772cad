"""Random weights of one size, written once in the naming of each format: LLaDA, SDAR, LLaDA2, Qwen3.

A freshly initialised network says nearly the same at every masked position, so that confidences would be one long
tie and any engine would disagree with any other. Here queries and keys are large enough for attention to be peaked,
which makes positions differ through their rotation, and the head is large enough for confidences to fill (0, 1).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from bench.side_by_side.settings import ModelSizes
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from fewstep.platform.artifacts import atomic_folder

FORMATS = ("llada", "sdar", "llada2", "qwen3")
# Standard deviation of an attention score and of a logit. With 9 the best of 32 768 normal logits leads by 2
# on average, exponentially distributed: a third of the positions are above 0.9, and hardly any is 1 in fp32.
SCORE_STD, LOGIT_STD = 3.0, 9.0
MASK_TEXT = {"llada": "<|mdm_mask|>", "sdar": "<|MASK|>", "llada2": "<|mask|>", "qwen3": "<|MASK|>"}

State = dict[str, torch.Tensor]


def write_models(folder: Path, sizes: ModelSizes, seed: int = 0) -> dict[str, Path]:
    """Write every format that is not there yet; a folder appears whole or not at all."""
    paths = {name: folder / name for name in FORMATS}
    if not (paths["llada"] / "config.json").is_file():
        write_model(paths["llada"], "llada", sizes, llada_state(sizes, seed))
    if not all((paths[name] / "config.json").is_file() for name in FORMATS):
        state = sdar_state(sizes, seed)
        for name, tensors in (("sdar", state), ("llada2", llada2_state(state, sizes)), ("qwen3", state)):
            write_model(paths[name], name, sizes, tensors)
    return paths


def write_model(folder: Path, name: str, sizes: ModelSizes, state: State) -> None:
    """config.json, model.safetensors (bf16, as the published ones) and a tokenizer that transformers reads too."""
    with atomic_folder(folder) as temporary:
        save_file(
            {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in state.items()},
            str(temporary / "model.safetensors"),
            metadata={"format": "pt"},
        )
        config = {"llada": llada_config, "sdar": sdar_config, "llada2": llada2_config, "qwen3": qwen3_config}
        _dump(temporary / "config.json", config[name](sizes))
        tokenizer(sizes, MASK_TEXT[name]).save(str(temporary / "tokenizer.json"))
        _dump(temporary / "tokenizer_config.json", tokenizer_config(MASK_TEXT[name]))


def llada_state(sizes: ModelSizes, seed: int) -> State:
    """LLaDA's names; queries and keys carry the peakedness, since nothing normalises them."""
    draw, hidden, inner = _Draw(seed), sizes.hidden_size, sizes.intermediate_size
    state = {"model.transformer.wte.weight": draw(sizes.vocab_size, hidden, 1.0)}
    for layer in range(sizes.num_hidden_layers):
        at = f"model.transformer.blocks.{layer}."
        scale = hidden**-0.5
        state[at + "attn_norm.weight"] = torch.ones(hidden)
        state[at + "ff_norm.weight"] = torch.ones(hidden)
        state[at + "q_proj.weight"] = draw(hidden, hidden, scale * SCORE_STD**0.5)
        state[at + "k_proj.weight"] = draw(hidden, hidden, scale * SCORE_STD**0.5)
        state[at + "v_proj.weight"] = draw(hidden, hidden, scale)
        state[at + "attn_out.weight"] = draw(hidden, hidden, scale)
        state[at + "ff_proj.weight"] = draw(inner, hidden, scale)
        state[at + "up_proj.weight"] = draw(inner, hidden, scale)
        state[at + "ff_out.weight"] = draw(hidden, inner, inner**-0.5)
    state["model.transformer.ln_f.weight"] = torch.ones(hidden)
    state["model.transformer.ff_out.weight"] = _head(draw, sizes)
    return state


def sdar_state(sizes: ModelSizes, seed: int) -> State:
    """Qwen3's names, which SDAR keeps; normalised queries and keys carry the peakedness in their norms' weights."""
    draw, hidden, inner = _Draw(seed), sizes.hidden_size, sizes.intermediate_size
    kv = sizes.num_key_value_heads * sizes.head_dim
    state = {"model.embed_tokens.weight": draw(sizes.vocab_size, hidden, 1.0)}
    for layer in range(sizes.num_hidden_layers):
        at = f"model.layers.{layer}."
        scale = hidden**-0.5
        state[at + "input_layernorm.weight"] = torch.ones(hidden)
        state[at + "post_attention_layernorm.weight"] = torch.ones(hidden)
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            state[at + f"self_attn.{name}.weight"] = draw(rows, hidden, scale)
        for name in ("q_norm", "k_norm"):
            state[at + f"self_attn.{name}.weight"] = torch.full((sizes.head_dim,), SCORE_STD**0.5)
        for name, shape, std in (
            ("gate_proj", (inner, hidden), scale),
            ("up_proj", (inner, hidden), scale),
            ("down_proj", (hidden, inner), inner**-0.5),
        ):
            state[at + f"mlp.{name}.weight"] = draw(*shape, std)
    state["model.norm.weight"] = torch.ones(hidden)
    state["lm_head.weight"] = _head(draw, sizes)
    return state


def llada2_state(sdar: State, sizes: ModelSizes) -> State:
    """The same network under LLaDA2's names: dense layers, whole heads rotated, queries, keys and values in one map."""
    renamed = {
        "model.embed_tokens.weight": "model.word_embeddings.weight",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    state = {new: sdar[old] for old, new in renamed.items()}
    for layer in range(sizes.num_hidden_layers):
        at = f"model.layers.{layer}."
        fused = [sdar[at + f"self_attn.{name}_proj.weight"] for name in "qkv"]
        state[at + "attention.query_key_value.weight"] = torch.cat(fused)
        state[at + "attention.query_layernorm.weight"] = sdar[at + "self_attn.q_norm.weight"]
        state[at + "attention.key_layernorm.weight"] = sdar[at + "self_attn.k_norm.weight"]
        state[at + "attention.dense.weight"] = sdar[at + "self_attn.o_proj.weight"]
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ):
            state[at + name + ".weight"] = sdar[at + name + ".weight"]
    return state


def llada_config(sizes: ModelSizes) -> dict[str, Any]:
    """LLaDA-8B-Instruct's keys."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": sizes.hidden_size,
        "embedding_dropout": 0.0,
        "embedding_size": sizes.vocab_size,
        "eos_token_id": sizes.eos_token_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": "cpu",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": sizes.mask_token_id,
        "max_sequence_length": sizes.max_position_embeddings,
        "mlp_hidden_size": sizes.intermediate_size,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": sizes.num_attention_heads,
        "n_kv_heads": sizes.num_attention_heads,
        "n_layers": sizes.num_hidden_layers,
        "pad_token_id": sizes.eos_token_id,
        "residual_dropout": 0.0,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": sizes.rope_theta,
        "scale_logits": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "vocab_size": sizes.vocab_size,
        "weight_tying": False,
    }


def qwen3_config(sizes: ModelSizes) -> dict[str, Any]:
    """Qwen3's keys; the autoregressive decoder of equal size."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": sizes.eos_token_id,
        "eos_token_id": sizes.eos_token_id,
        "pad_token_id": sizes.eos_token_id,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": sizes.max_position_embeddings,
        "max_window_layers": sizes.num_hidden_layers,
        "model_type": "qwen3",
        "num_attention_heads": sizes.num_attention_heads,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_key_value_heads": sizes.num_key_value_heads,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": sizes.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": sizes.vocab_size,
    }


def sdar_config(sizes: ModelSizes, block_size: int = 32) -> dict[str, Any]:
    """SDAR's keys: Qwen3's and the block's."""
    return qwen3_config(sizes) | {
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "block_size": block_size,
        "fuse_cross_entropy": True,
        "mask_token_id": sizes.mask_token_id,
        "model_type": "sdar",
        "use_cache": False,
    }


def llada2_config(sizes: ModelSizes) -> dict[str, Any]:
    """LLaDA2's keys, with every layer dense."""
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "eos_token_id": sizes.eos_token_id,
        "first_k_dense_replace": sizes.num_hidden_layers,
        "mask_token_id": sizes.mask_token_id,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": sizes.max_position_embeddings,
        "model_type": "llada2_moe",
        "moe_intermediate_size": sizes.intermediate_size,
        "n_group": 1,
        "num_attention_heads": sizes.num_attention_heads,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_key_value_heads": sizes.num_key_value_heads,
        "num_shared_experts": 0,
        "output_dropout": 0.0,
        "pad_token_id": sizes.eos_token_id,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": sizes.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "vocab_size": sizes.vocab_size,
    }


def tokenizer(sizes: ModelSizes, mask_text: str) -> Tokenizer:
    """One word a token, so that text sent over HTTP is the token ids that everybody else gets."""
    words = {f"t{index}": index for index in range(sizes.vocab_size)}
    for index, text in ((sizes.mask_token_id, mask_text), (sizes.eos_token_id, "<|endoftext|>")):
        del words[f"t{index}"]
        words[text] = index
    made = Tokenizer(models.WordLevel(words, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([mask_text, "<|endoftext|>"])
    return made


def tokenizer_config(mask_text: str) -> dict[str, Any]:
    """The chat template is the message itself."""
    return {
        "chat_template": "{{ messages[0]['content'] }}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "mask_token": mask_text,
        "model_max_length": 1 << 20,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _head(draw: _Draw, sizes: ModelSizes) -> torch.Tensor:
    """[V, d]. Mask and end of sequence have logit 0, which is never the largest: answers keep their length."""
    head = draw(sizes.vocab_size, sizes.hidden_size, LOGIT_STD * sizes.hidden_size**-0.5)
    head[[sizes.mask_token_id, sizes.eos_token_id]] = 0.0
    return head


def _dump(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


class _Draw:
    """Normal weights from a generator of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0.0, std, generator=self.generator)
