"""Floating-point operations of a training step, and what the machine's matrix products reach: together, utilisation."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fewstep.kernels.model.config import ModelConfig

_SIZE = 1024
_REPEATS = 5


@dataclass(frozen=True)
class Product:
    """`count` products of [rows, inner] with [inner, outer]; a forward needs 2 · rows · inner · outer operations for each,
    its backward twice that."""

    rows: int
    inner: int
    outer: int
    count: int

    @property
    def flops(self) -> float:
        """Of the forward."""
        return 2.0 * self.rows * self.inner * self.outer * self.count


def products(config: ModelConfig, rows: int, targets: int) -> list[Product]:
    """The matrix products of one forward over so many rows, with logits at the target rows only; attention's own left out.

    A mixture of experts counts the experts a row is routed to and the shared ones.
    """
    hidden, width = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    layers = config.num_hidden_layers
    found = [
        Product(rows, hidden, queries, layers),
        Product(rows, hidden, keys, 2 * layers),
        Product(rows, queries, hidden, layers),
        Product(targets, hidden, config.vocab_size, 1),
    ]
    routed = sum(config.is_moe_layer(layer) for layer in range(layers))
    if dense := layers - routed:
        found += _mlp(rows, hidden, config.intermediate_size, dense)
    if config.moe is not None and routed:
        moe = config.moe
        used = moe.num_experts_per_tok + moe.num_shared_experts
        found += _mlp(rows * used, hidden, moe.moe_intermediate_size, routed)
        found.append(Product(rows, hidden, moe.num_experts, routed))
    return found


def _mlp(rows: int, hidden: int, inner: int, layers: int) -> list[Product]:
    return [Product(rows, hidden, inner, 2 * layers), Product(rows, inner, hidden, layers)]


def training_flops(config: ModelConfig, rows: int, targets: int, pairs: int, frozen: bool = False) -> float:
    """Of forward and backward; what gradient checkpointing repeats is not counted, as usual for model FLOP utilisation
    (PaLM, 2204.02311, appendix B).

    Args:
        rows: real ones, no padding. pairs: of rows of the same sample, whether or not one sees the other.
        frozen: the weights are those under an adapter: their products have a gradient of the input only. The adapter's own,
            some 2 · rank / hidden_size of them, are left out.
    """
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    matrices = sum(product.flops for product in products(config, rows, targets))
    return (2.0 if frozen else 3.0) * matrices + 3.0 * attention


def matmul_rate(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """FLOP/s of a square product of 1,024 on this process's threads, the best of five: what `mfu` is a share of."""
    left, right = (torch.ones(_SIZE, _SIZE, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first one warms up, and is never the best
        _wait(left)
        started = time.perf_counter()
        torch.mm(left, right)
        _wait(left)
        best = min(best, time.perf_counter() - started)
    return 2.0 * _SIZE**3 / best


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
