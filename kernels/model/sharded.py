"""The transformer in parts: what rank 0 runs, what the others run, and the sum that joins them twice a layer.

Shapes as in `transformer.py`; a rank's heads and inner columns are `sharding.shard_config`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.rotary import rotary_table
from fewstep.kernels.model.sharding import shard_config
from fewstep.kernels.model.transformer import (
    Attention,
    Layer,
    Transformer,
    pack_projections,
    rotary_rows,
    run_layers,
)

# A tensor to the sum of all ranks' tensors of that shape, the same bits on every rank: a router that saw other bits
# than its neighbour's would choose other experts. Each rank calls it equally often.
Sum = Callable[[torch.Tensor], torch.Tensor]


class ShardedLayer(Layer):
    """One rank's heads and inner columns of a layer.

    Attention and MLP are given zeros to add to and the residual is added behind the sum: in bfloat16 a residual that
    went through the sum would be rounded once more for each rank.
    """

    def __init__(self, config: ModelConfig, layer: int, total: Sum) -> None:
        super().__init__(config, layer)
        self.total = total

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
        nothing = torch.zeros_like(residual)
        own = self.self_attn(self.input_layernorm(x), cos, sin, layer, attention, nothing, rows)
        x = residual + self.total(own)
        return x + self.total(self.mlp(self.post_attention_layernorm(x), nothing))


class LeadingShard(Transformer):
    """Rank 0's part: embedding, its share of the layers, final norm and head.

    Args:
        whole: the model's configuration, which stays `config`; that of the share is `held`.
    Raises:
        ConfigError: the model cannot be dealt to so many ranks.
    """

    alone = False

    def __init__(self, whole: ModelConfig, num_ranks: int, total: Sum) -> None:
        held = shard_config(whole, num_ranks)
        super().__init__(held)
        self.config, self._held = whole, held
        self.layers = _layers(held, total)

    @property
    def held(self) -> ModelConfig:
        """As `Transformer.held`: of this rank's heads and inner columns."""
        return self._held


class FollowingShard(nn.Module):
    """Another rank's part: its share of the layers, nothing of the vocabulary."""

    def __init__(self, whole: ModelConfig, num_ranks: int, total: Sum) -> None:
        super().__init__()
        self.config = shard_config(whole, num_ranks)
        self.layers = _layers(self.config, total)
        with torch.device("cpu"):  # as `Transformer`'s
            cos, sin = rotary_table(self.config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        rows: torch.Tensor | None = None,
    ) -> None:
        """The layers over embedded rows [N, R, d]; what comes out is rank 0's, too, so nothing is returned."""
        cos, sin = rotary_rows(self.rope_cos, self.rope_sin, positions)
        run_layers(self.layers, x, cos, sin, attention, rows)

    def pack(self) -> None:
        """As `Transformer.pack`."""
        pack_projections(self)


def _layers(config: ModelConfig, total: Sum) -> nn.ModuleList:
    return nn.ModuleList(ShardedLayer(config, layer, total) for layer in range(config.num_hidden_layers))
