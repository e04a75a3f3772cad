"""One denoising step of a dense 8 B-shaped model with random weights: forward, head, commit, the engine's own parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.kernels.attention import block_attention
from fewstep.kernels.confidence import POLICY_KINDS, Candidates, CanvasBlock, Committed, PolicyTensors, commit
from fewstep.kernels.head import head_confidence
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.kernels.rope import apply_rope, rope_and_write

PAGE = 32


def model_config(smoke: bool) -> ModelConfig:
    """Sizes of an 8 B model; with `smoke`, of a toy with the same proportions."""
    sizes = (512, 64, 2, 4, 2, 16, 128) if smoke else (151_936, 4096, 32, 32, 8, 128, 12_288)
    vocabulary, hidden, layers, heads, kv_heads, head_dim, intermediate = sizes
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        embedding_norm=False,
        block_size=32,
        mask_token_id=3,
        eos_token_id=0,
        pad_token_id=0,
    )


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Weights drawn on the device: normal(0, 0.02), norms 1."""
    with torch.device("meta"):
        model = Transformer(config)
    cos, sin = model.rope_cos, model.rope_sin
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            data = torch.empty(parameter.shape, device=device, dtype=dtype)
            data = data.fill_(1.0) if data.dim() == 1 else data.normal_(0.0, 0.02)
            setattr(module, name, torch.nn.Parameter(data, requires_grad=False))
    model.rope_cos, model.rope_sin = cos.to(device), sin.to(device)
    return model.eval()


@dataclass(frozen=True)
class StepShape:
    """Sequences, rows of each (one block), and positions cached for each."""

    sequences: int
    rows: int
    prefix: int


class DenoiseStep:
    """A step with every tensor in place, so that calling it again is the same work and it can be a CUDA graph."""

    def __init__(self, model: Transformer, shape: StepShape, seed: int = 0) -> None:
        self.model, self.shape = model, shape
        config, weight = model.config, model.embed_tokens.weight
        device, dtype = weight.device, weight.dtype
        generator = torch.Generator(device=device).manual_seed(seed)
        count, rows, pages = shape.sequences, shape.rows, -(-shape.prefix // PAGE)
        store = (config.num_hidden_layers, count * pages, PAGE, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = (
            torch.randn(store, generator=generator, device=device, dtype=dtype) for _ in range(2)
        )
        order = torch.randperm(count * pages, generator=torch.Generator().manual_seed(seed))
        self.page_table = order.view(count, pages).to(device, torch.int32)
        self.lengths = [
            torch.full((count,), number, dtype=torch.int32, device=device)
            for number in (shape.prefix, 0, 0, rows)
        ]
        self.nowhere = torch.full((count * rows,), -1, device=device)
        self.tokens = torch.full((1, count * rows), config.mask_token_id, device=device)
        self.positions = (shape.prefix + torch.arange(rows, device=device)).repeat(count)[None]
        self.rows = torch.arange(count * rows, device=device)
        self.numbers = torch.zeros(count * rows, device=device), torch.ones(count * rows, device=device)
        block = torch.full((count, rows), config.mask_token_id, device=device)
        everywhere = torch.ones_like(block, dtype=torch.bool)
        ends = torch.full((count, 1), config.eos_token_id, device=device)
        self.canvas = CanvasBlock(block, everywhere, everywhere, ends, config.eos_token_id)
        self.policy = PolicyTensors(
            torch.full((count,), POLICY_KINDS["threshold"], dtype=torch.int8, device=device),
            torch.full((count,), 0.9, device=device),
            torch.ones(count, dtype=torch.int64, device=device),
            torch.full((count,), torch.inf, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
        )

    def __call__(self) -> Committed:
        hidden = self.model(self.tokens, self.positions, self._attend)[0]
        stats = head_confidence(
            hidden,
            self.rows,
            self.model.head_weight,
            mask_token_id=self.model.config.mask_token_id,
            temperature=self.numbers[0],
            top_p=self.numbers[1],
            uniform=None,
        )
        block = (self.shape.sequences, self.shape.rows)
        return commit(
            self.canvas, Candidates(stats.token.view(block), stats.confidence.view(block)), self.policy
        )

    def _attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        pages = self.keys[layer], self.values[layer]
        q = apply_rope(q, cos, sin)
        k = rope_and_write(k[0], v[0], cos[0, :, 0], sin[0, :, 0], self.nowhere, *pages)
        units = (self.shape.sequences, self.shape.rows)
        own = (tensor.view(*units, *tensor.shape[-2:]) for tensor in (q, k, v))
        out = block_attention(*own, *pages, self.page_table, *self.lengths, own_block=self.shape.rows)
        return out.view(q.shape)

    def num_weight_bytes(self) -> int:
        """Bytes of every weight a step reads; of the embedding it looks up a few rows only."""
        parameters = dict(self.model.named_parameters())
        parameters.pop("embed_tokens.weight")
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())

    def num_cache_bytes(self) -> int:
        """Bytes of the keys and values a step reads."""
        positions = self.shape.sequences * self.shape.prefix
        return 2 * len(self.keys) * positions * self.keys[0, 0, 0].numel() * self.keys.element_size()

    def flop(self) -> int:
        """Of the products with the weights, which are nearly all."""
        rows = self.shape.sequences * self.shape.rows
        return 2 * rows * self.num_weight_bytes() // self.keys.element_size()
