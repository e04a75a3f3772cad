"""The names of `Transformer.state_dict()`, without torch; a test compares them with the module's own."""

from __future__ import annotations

from collections.abc import Iterator

from fewstep.kernels.model.config import ModelConfig

# Stays float32 whatever the weights are: it decides between experts that score alike.
ROUTER_BIAS = "router.bias"

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def tensor_names(config: ModelConfig) -> Iterator[str]:
    """Every tensor of a model, from the embedding to the head."""
    yield "embed_tokens.weight"
    if config.embedding_norm:
        yield "embed_norm.weight"
    for layer in range(config.num_hidden_layers):
        for name in layer_names(config, layer):
            yield f"layers.{layer}.{name}"
    yield "norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight"


def layer_names(config: ModelConfig, layer: int) -> Iterator[str]:
    """The tensors of one layer, without the `layers.N.` before them."""
    yield "input_layernorm.weight"
    for name in _ATTENTION:
        yield f"self_attn.{name}.weight"
        if config.output_bias if name == "o_proj" else config.qkv_bias:
            yield f"self_attn.{name}.bias"
    if config.qk_norm:
        yield from ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    yield "post_attention_layernorm.weight"
    if config.is_moe_layer(layer):
        yield from _moe_names(config)
        return
    for name in _MLP:
        yield f"mlp.{name}.weight"
        if config.mlp_bias:
            yield f"mlp.{name}.bias"


def _moe_names(config: ModelConfig) -> Iterator[str]:
    assert config.moe is not None
    yield "mlp.router.weight"
    if config.moe.expert_bias:
        yield f"mlp.{ROUTER_BIAS}"
    yield from (f"mlp.experts.{name}" for name in _MLP)
    if config.moe.num_shared_experts:
        yield from (f"mlp.shared.{name}.weight" for name in _MLP)
