"""What a model is: sizes, attention kind, special tokens; torch-free, so the CLI can read it fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["fp32", "bf16"]
AttentionKind = Literal["block_causal", "bidirectional", "causal"]
ComputeDtype = Literal["saved", "float32", "bfloat16"]
StoredDtype = Literal["float32", "bfloat16", "float16"]

# A token id that no model has: an autoregressive source has no mask token.
NO_TOKEN = -1


class RopeScaling(BaseModel):
    """How rotary frequencies are stretched past the trained length; field names are Hugging Face's.

    linear: positions divided by `factor` (Chen et al., 2306.15595). llama3: low frequencies divided by `factor`, high
    ones kept, a linear blend between (Llama 3.1's rule). yarn: the blend by number of rotations of Peng et al.
    (2309.00071, section 3.2), queries and keys scaled by `attention_factor`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(ge=1.0)
    original_max_position_embeddings: int = Field(
        default=0, ge=0, description="trained length; not for linear"
    )
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = Field(default=None, description="yarn; None = 0.1 ln(factor) + 1")

    @model_validator(mode="after")
    def _consistent(self) -> RopeScaling:
        if self.kind != "linear" and not self.original_max_position_embeddings:
            raise ValueError(f"rope scaling {self.kind} needs original_max_position_embeddings")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


class MoeConfig(BaseModel):
    """Mixture of experts in place of the MLP; field names are Hugging Face's (DeepSeek-V3's router, 2412.19437, 2.1.2).

    A token's experts are the best by score plus a per-expert bias that only choosing sees, among the experts of the
    best `topk_group` of `n_group` groups; their outputs are weighted by the scores without the bias.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_experts: int = Field(ge=1)
    num_experts_per_tok: int = Field(ge=1)
    moe_intermediate_size: int = Field(ge=1)
    num_shared_experts: int = Field(
        default=0, ge=0, description="one MLP of this many experts' size sees every token"
    )
    first_k_dense_replace: int = Field(
        default=0, ge=0, description="layers before this one keep the plain MLP"
    )
    n_group: int = Field(default=1, ge=1)
    topk_group: int = Field(default=1, ge=1)
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = Field(default=True, description="divide the chosen scores by their sum")
    routed_scaling_factor: float = 1.0
    expert_bias: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> MoeConfig:
        if self.num_experts % self.n_group:
            raise ValueError("n_group must divide num_experts")
        if self.topk_group > self.n_group:
            raise ValueError("topk_group must be at most n_group")
        if self.num_experts_per_tok > self.num_experts // self.n_group * self.topk_group:
            raise ValueError("num_experts_per_tok must be at most the experts of topk_group groups")
        return self


class ModelConfig(BaseModel):
    """Sizes, switches and special tokens of a model of any family.

    Field names are Hugging Face's where Hugging Face has one. The transformer is pre-norm with RMSNorm, SwiGLU,
    grouped queries and RoPE; what families differ in is a field. `fewstep_block_diffusion`, the family whose
    config.json is these very fields, has a normalised embedding, normalised q and k, a tied head and block-diffusion
    attention unless its file says otherwise; every other family's fields come from its reader in `families/`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str = "fewstep_block_diffusion"
    architectures: tuple[str, ...] = ("FewstepBlockDiffusionLM",)
    vocab_size: int = Field(ge=4, description="rows of the embedding; a tokenizer may use fewer")
    hidden_size: int = Field(ge=8)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    intermediate_size: int = Field(ge=8)
    max_position_embeddings: int = Field(ge=16)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="share of each head's dimensions that is rotated, the first ones",
    )
    tie_word_embeddings: bool = True
    torch_dtype: StoredDtype = Field(default="float32", description="the weights' type on disk")
    embedding_norm: bool = True
    qk_norm: bool = Field(default=True, description="RMSNorm over each head of queries and keys")
    qkv_bias: bool = False
    output_bias: bool = Field(default=False, description="bias of attention's output projection")
    mlp_bias: bool = False
    moe: MoeConfig | None = None
    attention_kind: AttentionKind = Field(
        default="block_causal",
        description="block_causal: a row sees earlier blocks and its own; bidirectional: every row sees every row; "
        "causal: a row sees earlier rows and itself (an autoregressive source)",
    )
    block_size: int = Field(
        ge=1,
        description="positions denoised together. block_causal: aligned at position 0, fixed by training; "
        "bidirectional: counted from the end of the prompt, a default that a policy may change; causal: 1",
    )
    logit_shift: bool = Field(
        default=False, description="the row at position p - 1 predicts the token at p, as in autoregression"
    )
    mask_token_id: int = Field(ge=NO_TOKEN, description=f"{NO_TOKEN} = none (causal only)")
    eos_token_id: int = Field(ge=0)
    pad_token_id: int = Field(ge=0)
    family: str = Field(
        default="fewstep", exclude=True, description="the adapter that reads and writes the folder"
    )
    source: str | None = Field(
        default=None, exclude=True, description="config.json as another family wrote it"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} must be below vocab_size {self.vocab_size}")
        if self.attention_kind == "causal" and self.block_size != 1:
            raise ValueError("block_size must be 1 where attention_kind is causal")
        if self.attention_kind != "causal" and self.mask_token_id == NO_TOKEN:
            raise ValueError(f"mask_token_id is needed where attention_kind is {self.attention_kind}")
        if self.rotary_dim % 2:
            raise ValueError("partial_rotary_factor · head_dim must be even")
        return self

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return int(self.head_dim * self.partial_rotary_factor)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.first_k_dense_replace

    @property
    def sees_block(self) -> int:
        """The block size that `visibility` needs: a bidirectional model is one block as long as its context."""
        return self.max_position_embeddings if self.attention_kind == "bidirectional" else self.block_size

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read `folder/config.json` of any known family; a CheckpointError names what is wrong with it."""
        # Late: the readers build ModelConfigs, so they import this module.
        from fewstep.kernels.model.families import read_config

        return read_config(folder)

    def dump(self) -> str:
        """config.json. Fields that came with other families are written only where they say something."""
        if self.source is not None:
            return self.source
        values: dict[str, Any] = self.model_dump(mode="json")
        for name in _WRITTEN_WHERE_SET:
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        return json.dumps(values, indent=2) + "\n"


_WRITTEN_WHERE_SET = (
    "rope_scaling",
    "partial_rotary_factor",
    "embedding_norm",
    "qk_norm",
    "qkv_bias",
    "output_bias",
    "mlp_bias",
    "moe",
    "logit_shift",
)
