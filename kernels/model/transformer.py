"""The one transformer that the engine and the trainer share.

Shape legend: N sequences, R rows (token positions of one forward), d hidden size, H heads, K key/value heads,
D head dimension, V vocabulary. Attention is a callback, so the cache layout is the caller's business and the
weights' arithmetic is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewstep.kernels.attention import attend
from fewstep.kernels.head import pack_head
from fewstep.kernels.linear import PackedWeight, Projection
from fewstep.kernels.model.config import NO_TOKEN, ModelConfig
from fewstep.kernels.model.feed_forward import MLP, MixtureOfExperts
from fewstep.kernels.model.rotary import rotary_table
from fewstep.kernels.norm import rms_norm
from fewstep.kernels.rope import apply_rope
from fewstep.platform.errors import CheckpointError

# (layer index, q [N,R,H,D], k [N,R,K,D], v [N,R,K,D], cos, sin float32 [N,R,1,D'/2]) -> [N,R,H,D], D' the rotated
# dimensions. Queries and keys come before their rotation, so that rotating keys and storing them can be one pass.
Attention = Callable[
    [int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]


_OUTPUT_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def _optional_norm(wanted: bool, size: int, config: ModelConfig) -> nn.Module:
    return RMSNorm(size, config.rms_norm_eps) if wanted else nn.Identity()


class SelfAttention(nn.Module):
    """Grouped-query attention; queries and keys are normalised first in some families (Qwen3's arrangement)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = Projection(config.hidden_size, self.num_heads * self.head_dim, config.qkv_bias)
        self.k_proj = Projection(config.hidden_size, self.num_kv_heads * self.head_dim, config.qkv_bias)
        self.v_proj = Projection(config.hidden_size, self.num_kv_heads * self.head_dim, config.qkv_bias)
        self.o_proj = Projection(self.num_heads * self.head_dim, config.hidden_size, config.output_bias)
        self.q_norm = _optional_norm(config.qk_norm, self.head_dim, config)
        self.k_norm = _optional_norm(config.qk_norm, self.head_dim, config)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: int,
        attention: Attention,
        residual: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        out = attention(layer, q, k, v, cos, sin)
        if rows is not None:
            out = out[:, rows]
        return self.o_proj.plus(out.flatten(-2), residual)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            MixtureOfExperts(config)
            if config.is_moe_layer(layer)
            else MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        )

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: int,
        attention: Attention,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        residual = x if rows is None else x[:, rows]
        x = self.self_attn(self.input_layernorm(x), cos, sin, layer, attention, residual, rows)
        return self.mlp(self.post_attention_layernorm(x), x)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A pre-norm decoder stack of any family; who sees whom is the attention callback's rule.

    Built under `torch.device("meta")` only the rotary tables take memory; `load_model` then assigns the weights.

    Attributes:
        gradient_checkpointing: keep each layer's input only and run the layer again in the backward pass.
        alone: whether a forward is this process's work and nobody else's, so that a GPU may repeat it as a graph.
    """

    alone = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # Normalising the embedding (with q/k norms) trained 1.5-2.4x faster in probes of the embedded model's size.
        self.embed_norm = _optional_norm(config.embedding_norm, config.hidden_size, config)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.packed_head: list[PackedWeight] | None = None
        with torch.device("cpu"):  # no checkpoint holds the tables, so a meta module needs real ones
            cos, sin = rotary_table(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final-normed hidden states [N, R, d] of int64 tokens [N, R] at absolute positions [N, R].

        Args:
            rows: int64 [A], indices into R: only these are asked for, [N, A, d]. The last layer then does nothing for
                the others but their keys and values, which in a model of L layers saves up to 1/L of the work.
        """
        x = self.embed(tokens)
        cos, sin = rotary_rows(self.rope_cos, self.rope_sin, positions)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        return self.norm(run_layers(self.layers, x, cos, sin, attention, rows, checkpointing))  # type: ignore[no-any-return]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the first layer is given, [N, R, d] of int64 tokens [N, R]."""
        return self.embed_norm(self.embed_tokens(tokens))  # type: ignore[no-any-return]

    @property
    def held(self) -> ModelConfig:
        """The configuration of the part whose keys and values this process computes: here, of everything."""
        return self.config

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, d], the embedding where the head is tied to it."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def take_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy other weights over these and lay them out for inference.

        Raises:
            CheckpointError: names a tensor that is missing, surplus or of another shape; the old weights stay whole.
        """
        self.check_weights(state)
        self.load_state_dict(dict(state))
        self.pack()

    def check_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Whether `take_weights` would take these; raises as it does."""
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        new = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if own != new:
            differing = sorted(name for name in own.keys() | new.keys() if own.get(name) != new.get(name))
            raise CheckpointError(
                "weights", f"a different {differing[0]}", "the engine's tensors", "push the same model"
            )

    def pack(self) -> None:
        """Lay the weights out for inference as they are now (see `fewstep.kernels.linear`); to be called again after a
        change. Results differ from unpacked ones by less than a rounding of bfloat16."""
        pack_projections(self)
        self.packed_head = pack_head(self.head_weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., V]; the mask token gets -inf, it is never an answer."""
        scores = F.linear(hidden, self.head_weight)
        if self.config.mask_token_id != NO_TOKEN:
            scores[..., self.config.mask_token_id] = float("-inf")
        return scores

    def initialise(self, seed: int) -> None:
        """Fresh weights from a generator of its own: normal(0, 0.02), output projections scaled by depth; biases 0."""
        with torch.no_grad():
            for name, values in fresh_weights(self.config, seed):
                self.get_parameter(name).copy_(values)


def run_layers(
    layers: nn.ModuleList,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attention: Attention,
    rows: torch.Tensor | None,
    checkpointing: bool = False,
) -> torch.Tensor:
    """[N, R, d] through the layers, [N, A, d] of the asked rows; see `Transformer.forward`."""
    last = len(layers) - 1
    for index, layer in enumerate(layers):
        wanted = rows if index == last else None
        if checkpointing:
            x = checkpoint(layer, x, cos, sin, index, attention, wanted, use_reentrant=False)
        else:
            x = layer(x, cos, sin, index, attention, wanted)
    return x


def rotary_rows(
    cos: torch.Tensor | nn.Module, sin: torch.Tensor | nn.Module, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, R, 1, D'/2] of the rotary tables at positions [N, R]."""
    return cos[positions][:, :, None], sin[positions][:, :, None]  # type: ignore[index]


def pack_projections(module: nn.Module) -> None:
    """Lay out the weights of every projection below a module, as they are now."""
    for part in module.modules():
        if isinstance(part, Projection):
            part.pack()


def masked_attention(visible: torch.Tensor) -> Attention:
    """Attention over the rows of the forward itself, `visible` bool [N, R, R]; no cache (training)."""

    def attention(
        _layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        return attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, visible)

    return attention


def fresh_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """What `Transformer.initialise` sets, float32, one tensor at a time; the scales of norms stay as they are built."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * config.num_hidden_layers) ** -0.5
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            yield name, torch.zeros(shape)
        if len(shape) < 2:
            continue
        std = 0.02 * (depth_scale if name.endswith(_OUTPUT_PROJECTIONS) else 1.0)
        if not name.startswith("embed"):
            std = max(std, shape[-1] ** -0.5 * (depth_scale if std < 0.02 else 1.0))
        yield name, torch.empty(shape).normal_(0.0, std, generator=generator)
