"""config.json of a block-diffusion model, Hugging Face layout; torch-free, so the CLI can read it fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fewstep.platform.errors import CheckpointError

Precision = Literal["fp32", "bf16"]
AttentionKind = Literal["block_causal", "bidirectional"]


class ModelConfig(BaseModel):
    """Sizes and special tokens. Field names are Hugging Face's where Hugging Face has one.

    The architecture is Qwen3-like (pre-norm, RMSNorm, SwiGLU, grouped queries, normalised q and k, RoPE) with a
    normalised embedding, a tied head and block-diffusion attention.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: Literal["fewstep_block_diffusion"] = "fewstep_block_diffusion"
    architectures: tuple[str, ...] = ("FewstepBlockDiffusionLM",)
    vocab_size: int = Field(ge=4)
    hidden_size: int = Field(ge=8)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    intermediate_size: int = Field(ge=8)
    max_position_embeddings: int = Field(ge=16)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: Literal[True] = True
    torch_dtype: Literal["float32"] = "float32"
    attention_kind: AttentionKind = Field(
        default="block_causal",
        description="block_causal: a row sees earlier blocks and its own; bidirectional: every row sees every row",
    )
    block_size: int = Field(
        ge=1,
        description="positions denoised together. block_causal: aligned at position 0, fixed by training; "
        "bidirectional: counted from the end of the prompt, a default that a policy may change",
    )
    mask_token_id: int = Field(ge=0)
    eos_token_id: int = Field(ge=0)
    pad_token_id: int = Field(ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} must be below vocab_size {self.vocab_size}")
        return self

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read `folder/config.json`; a CheckpointError names what is wrong with it."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(
                str(path), "no such file", "a model folder in Hugging Face layout", "check the path"
            )
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            return cls.model_validate(values)
        except (json.JSONDecodeError, ValidationError) as error:
            reason = str(error).replace("\n", " ")[:300]
            raise CheckpointError(
                str(path), reason, "a fewstep_block_diffusion configuration", "repair or re-export it"
            ) from error

    def dump(self) -> str:
        return json.dumps(self.model_dump(), indent=2) + "\n"
