"""What is compared and how: the model's sizes and the settings every engine gets. No torch."""

from __future__ import annotations

import hashlib
from typing import Literal, Self

from pydantic import Field, model_validator

from fewstep.platform.config import Config

# LLaDA-8B's ids. A smaller vocabulary has its special tokens at its end.
LLADA_MASK, LLADA_EOS = 126_336, 126_081


class ModelSizes(Config):
    """One transformer, written in several formats. The head is not tied, as in LLaDA, SDAR and LLaDA2."""

    hidden_size: int = Field(default=768, ge=32)
    num_hidden_layers: int = Field(default=12, ge=1)
    num_attention_heads: int = Field(default=12, ge=1)
    num_key_value_heads: int = Field(default=4, ge=1)
    """Of the block-causal formats; LLaDA has as many as query heads."""
    intermediate_size: int = Field(default=3072, ge=32)
    vocab_size: int = Field(default=32_768, ge=64)
    """The default makes the head 18 % of layers and head together, as in SDAR-1.7B. LLaDA-8B's 126464 would make it half of a
    model this small, which flatters an engine that skips rows of the head."""
    max_position_embeddings: int = Field(default=1024, ge=64)
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def mask_token_id(self) -> int:
        return LLADA_MASK if self.vocab_size > LLADA_MASK else self.vocab_size - 1

    @property
    def eos_token_id(self) -> int:
        return LLADA_EOS if self.vocab_size > LLADA_MASK else self.vocab_size - 2

    def digest(self, seed: int) -> str:
        """A name for the weights of these sizes."""
        return hashlib.blake2b(f"{seed} {self.model_dump_json()}".encode(), digest_size=4).hexdigest()

    def num_layer_parameters(self, grouped: bool) -> int:
        """Parameters of the layers' linear maps, without embedding, head and norms.

        Args:
            grouped: whether keys and values have `num_key_value_heads` heads.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        kv = (self.num_key_value_heads if grouped else self.num_attention_heads) * self.head_dim
        return self.num_hidden_layers * hidden * (2 * hidden + 2 * kv + 3 * inner)

    def num_parameters(self, grouped: bool) -> int:
        """The same with embedding and head."""
        return self.num_layer_parameters(grouped) + 2 * self.vocab_size * self.hidden_size


class Settings(Config):
    """Every engine gets these; what a peer cannot do differently is stated in its row."""

    model: ModelSizes = ModelSizes()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the timed runs, on both sides. The parity check is always float32."""
    threads: int = Field(default=1, ge=1)
    prompt_tokens: int = Field(default=64, ge=1)
    max_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer; the end of sequence is ignored."""
    block_size: int = Field(default=32, ge=1)
    tokens_per_step: int = Field(default=4, ge=1)
    """Of the static schedule: an answer takes max_tokens / tokens_per_step forwards in every engine."""
    threshold: float = Field(default=0.9, gt=0.0, lt=1.0)
    streams: tuple[int, ...] = (1, 8)
    """Prompts asked at once; all have one length."""
    repeats: int = Field(default=3, ge=1)
    """Rounds; in each every engine of a comparison runs once, one after the other, and medians are reported."""
    parity_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer of the parity check."""
    vllm_compile: bool = True
    """Whether vLLM compiles (faster decoding, one to two minutes to start) or runs eagerly."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        for name in ("prompt_tokens", "max_tokens", "parity_tokens"):
            if getattr(self, name) % self.block_size:
                raise ValueError(f"{name} must be a multiple of block_size {self.block_size}")
        if self.block_size % self.tokens_per_step:
            raise ValueError(f"tokens_per_step must divide block_size {self.block_size}")
        if self.prompt_tokens + self.max_tokens > self.model.max_position_embeddings:
            raise ValueError("prompt_tokens and max_tokens must fit model.max_position_embeddings")
        return self

    def digest(self) -> str:
        """A name for these settings; results of other settings are not mixed with theirs."""
        return hashlib.blake2b(self.model_dump_json().encode(), digest_size=8).hexdigest()


# Seconds instead of minutes, to see that every peer runs; its figures mean nothing.
QUICK = (
    "model.hidden_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=256",
    "model.vocab_size=512",
    "prompt_tokens=32",
    "max_tokens=64",
    "repeats=1",
    "vllm_compile=false",
)
