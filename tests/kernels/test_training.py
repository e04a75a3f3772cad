"""The training forward: with its logits in chunks it is the forward that keeps them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from fewstep.kernels.model import training
from fewstep.kernels.model.config import ModelConfig, Precision
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.model.transformer import Transformer
from fewstep.kernels.rows import NO_TARGET, RowBatch

BLOCK_SIZE, MASK = 4, 1


def build() -> Transformer:
    config = ModelConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, max_position_embeddings=32, block_size=BLOCK_SIZE, mask_token_id=MASK, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    transformer = Transformer(config)
    transformer.initialise(0)
    return transformer


def batch() -> RowTensors:
    """Two clean sequences of 12 tokens, each followed by a noisy copy of every block."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 40, (2, 24))
    tokens[:, 12:] = np.where(generator.random((2, 12)) < 0.5, MASK, tokens[:, :12])
    positions = np.tile(np.arange(12), (2, 2))
    copies = np.repeat([[0, 1]], 12, axis=1).repeat(2, axis=0)
    targets = np.full((2, 24), NO_TARGET)
    targets[:, 12:] = np.where(tokens[:, 12:] == MASK, tokens[:, :12], NO_TARGET)
    return RowTensors.of(
        RowBatch(
            tokens,
            positions,
            copies,
            targets,
            np.ones((2, 24), dtype=np.float32),
            extras={},
            documents=np.zeros((2, 24), int),
        )
    )


def run(precision: Precision) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(logprob, entropy) and every parameter's gradient of a mixture of them."""
    model, rows = TrainingModel(build(), precision), batch()
    logprob, entropy = model(
        rows.tokens, rows.positions, rows.copies, rows.target_rows, rows.targets, BLOCK_SIZE
    )
    weights = torch.linspace(-1, 1, len(logprob))
    (logprob @ weights + entropy @ weights.flip(0)).backward()
    return logprob, entropy, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("precision", get_args(Precision))
def test_chunked_logits_give_the_same_numbers_and_gradients(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run(precision)
    calls = []
    monkeypatch.setattr(training, "holds_logits", lambda *_size: False)
    whole = training.linear_logprob
    monkeypatch.setattr(
        training,
        "linear_logprob",
        lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs, impl="chunked", max_elements=100),
    )
    chunked = run(precision)
    assert calls == [1]
    # In bf16 both round the gradient of a logit to 8 bits, at different places.
    tolerance = 1e-5 if precision == "fp32" else 2**-6
    for got, expected in zip(chunked[:2], kept[:2], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert chunked[2].keys() == kept[2].keys()
    for name, expected in kept[2].items():
        assert float((chunked[2][name] - expected).norm()) <= tolerance * float(expected.norm()), name
