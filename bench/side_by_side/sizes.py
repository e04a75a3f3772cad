"""What is compared: the model's sizes and the settings every engine gets; no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fewstep.platform.errors import ConfigError

# LLaDA-8B's ids. A smaller vocabulary has its special tokens at its end.
LLADA_MASK, LLADA_EOS = 126_336, 126_081


@dataclass(frozen=True)
class ModelSizes:
    """One transformer, written in several formats. The head is not tied, as in LLaDA, SDAR and LLaDA2.

    The default vocabulary makes the head 18 % of the body and head together, as in SDAR-1.7B; LLaDA-8B's own 126 464 entries
    would make it half of a model this small, and would flatter an engine that skips rows of the head.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    intermediate_size: int = 3072
    vocab_size: int = 32_768
    max_position_embeddings: int = 1024
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

    def linear_shapes(self, grouped: bool) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's linear maps. LLaDA has as many key as query heads; the others group them."""
        kv = (self.num_key_value_heads if grouped else self.num_attention_heads) * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
        return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]

    def num_body_parameters(self, grouped: bool) -> int:
        """Parameters of the layers' linear maps, without embedding, head and norms."""
        return self.num_hidden_layers * sum(rows * columns for rows, columns in self.linear_shapes(grouped))

    def num_parameters(self, grouped: bool) -> int:
        """The same with embedding and head."""
        return self.num_body_parameters(grouped) + 2 * self.vocab_size * self.hidden_size
