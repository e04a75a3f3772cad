"""The training module on every family: the probabilities its states ask for, their gradient, and less memory for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.small_checkpoints import CONFIGS, MASK, random_tensors, write_small
from tests.kernels.plain_families import plain_logits
from tests.kernels.test_families import expected_visibility

from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.model.config import NO_TOKEN, ModelConfig
from fewstep.kernels.model.training import RowTensors, TrainingModel, rows_before
from fewstep.kernels.rows import NO_TARGET, RowBatch, SampleRows

# Masked positions at both edges of blocks of 4 and of 8, in the first block behind the prompt and in the last.
SEQUENCE = np.array([7, 3, 90, 14, 22, 63, 55, 8, 21, 40, 41, 17, 30, 31, 32, 33])
NOISY = (4, 6, 8, 9, 12, 15)


def noisy_tokens(start: int = 0) -> np.ndarray[Any, Any]:
    tokens = SEQUENCE.copy()
    tokens[[p for p in NOISY if p >= start]] = MASK
    return tokens


def one_state(config: ModelConfig) -> SampleRows:
    """The clean sequence and one state of it with masks at NOISY (in a causal model, nothing is masked)."""
    rows = SampleRows.clean(SEQUENCE)
    target = np.isin(np.arange(len(SEQUENCE)), NOISY)
    tokens = SEQUENCE if config.mask_token_id == NO_TOKEN else noisy_tokens()
    rows.add_state(
        tokens,
        np.arange(len(SEQUENCE)),
        np.where(target, SEQUENCE, NO_TARGET),
        np.where(target, 1.0 / len(NOISY), 0.0).astype(np.float32),
    )
    return rows.states_only() if config.attention_kind == "bidirectional" else rows


def expected_logprobs(name: str) -> list[float]:
    """One plain forward a block: clean tokens before it, masks in it; the row that predicts is the family's rule."""
    block = {"sdar": 4, "stable_diffcoder": 4, "fast_dllm_v2": 8, "llada2": 8}.get(name)
    shift = name in ("dream", "fast_dllm_v2", "llama", "qwen2", "qwen3")
    causal = name in ("llama", "qwen2", "qwen3")
    tensors, size = random_tensors(CONFIGS[name], 0, torch.float32), len(SEQUENCE)
    visible, logprobs = expected_visibility(name, size), []
    for position in NOISY:
        tokens = SEQUENCE if causal else noisy_tokens(position // block * block if block else 0)
        logits = plain_logits(CONFIGS[name], tensors, tokens.tolist(), visible)
        row = logits[position - 1 if shift else position]
        if not causal:
            row[MASK] = -torch.inf
        logprobs.append(row.log_softmax(-1)[SEQUENCE[position]].item())
    return logprobs


def run(model: TrainingModel, rows: SampleRows) -> tuple[torch.Tensor, torch.Tensor]:
    batch = RowTensors.of(RowBatch.collate([rows, rows]))
    return model(
        batch.tokens, batch.positions, batch.copies, batch.target_rows, batch.targets,
        model.transformer.config.sees_block, batch.documents,
    )  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_asks_for_the_probabilities_of_the_definition(name: str, tmp_path: Path) -> None:
    transformer, _ = load_model(write_small(tmp_path, CONFIGS[name]))
    logprob, entropy = run(TrainingModel(transformer), one_state(transformer.config))
    expected = torch.tensor(expected_logprobs(name) * 2)
    torch.testing.assert_close(logprob.detach(), expected, rtol=1e-4, atol=1e-4)
    assert (entropy > 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_few_steps_lower_the_loss_of_every_family(name: str, tmp_path: Path) -> None:
    transformer, _ = load_model(write_small(tmp_path, CONFIGS[name], dtype=torch.bfloat16), torch.float32)
    model = TrainingModel(transformer.train())
    rows = one_state(transformer.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = -run(model, rows)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", ["dream", "llada2"])
def test_gradient_checkpointing_keeps_less_and_computes_the_same(name: str, tmp_path: Path) -> None:
    transformer, _ = load_model(write_small(tmp_path, CONFIGS[name]))
    model, rows = TrainingModel(transformer.train()), one_state(transformer.config)

    def gradient() -> tuple[dict[str, torch.Tensor], int]:
        kept: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = -run(model, rows)[0].mean()
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, sum(kept)

    plain, plain_kept = gradient()
    transformer.gradient_checkpointing = True
    again, kept = gradient()
    assert kept < 0.5 * plain_kept
    assert again.keys() == plain.keys()
    for parameter, value in plain.items():
        assert torch.equal(again[parameter], value), parameter


def test_the_row_before_is_clean_at_the_edge_of_a_block_and_a_neighbour_inside() -> None:
    rows = SampleRows.clean(np.arange(12))
    for blocks in ((1, 2), (2,)):  # two states, the second without block 1
        positions = np.concatenate([np.arange(4 * b, 4 * b + 4) for b in blocks])
        rows.add_state(positions, positions, positions, np.ones(len(positions), np.float32))
    batch = RowTensors.of(RowBatch.collate([rows, rows]))
    found = rows_before(batch.positions, batch.copies, batch.target_rows, 4).tolist()
    size = batch.positions.shape[1]
    first = [3, 12, 13, 14, 7, 16, 17, 18, 7, 20, 21, 22]
    assert found == first + [row + size for row in first]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_computed_as_they_are_alone(name: str, tmp_path: Path) -> None:
    transformer, _ = load_model(write_small(tmp_path, CONFIGS[name]))
    model, config = TrainingModel(transformer), transformer.config
    documents = []
    for shift, length in ((0, 16), (5, 8), (9, 12)):
        tokens = np.roll(SEQUENCE, shift)[:length]
        at = np.arange(length) % 3 == 1
        rows = SampleRows.clean(tokens)
        noisy = tokens if config.mask_token_id == NO_TOKEN else np.where(at, MASK, tokens)
        rows.add_state(noisy, np.arange(length), np.where(at, tokens, NO_TARGET), at.astype(np.float32))
        documents.append(rows.states_only() if config.attention_kind == "bidirectional" else rows)
    alone = torch.cat([logprobs(model, [rows]) for rows in documents])
    packed = logprobs(model, [SampleRows.pack(documents)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    beside = logprobs(model, [SampleRows.pack(documents[1:]), SampleRows.pack(documents)])
    torch.testing.assert_close(
        beside, torch.cat((alone[-len(beside) + len(alone) :], alone)), rtol=1e-4, atol=1e-5
    )


def logprobs(model: TrainingModel, samples: list[SampleRows]) -> torch.Tensor:
    batch = RowTensors.of(RowBatch.collate(samples))
    with torch.no_grad():
        logprob, _ = model(
            batch.tokens, batch.positions, batch.copies, batch.target_rows, batch.targets,
            model.transformer.config.sees_block, batch.documents,
        )  # fmt: skip
    return logprob


def test_the_row_before_lies_in_its_own_document() -> None:
    one, two = SampleRows.clean(np.arange(4)), SampleRows.clean(np.arange(8))
    one.add_state(np.arange(4), np.arange(4), np.array([-1, 1, 2, 3]), np.ones(4, np.float32))
    two.add_state(np.arange(8), np.arange(8), np.array([-1, *range(1, 8)]), np.ones(8, np.float32))
    batch = RowTensors.of(RowBatch.collate([SampleRows.pack([one, two])]))
    found = rows_before(batch.positions, batch.copies, batch.target_rows, 4, batch.documents).tolist()
    # Clean rows 0-3 and 4-11, then the states' rows 12-15 and 16-23.
    assert found == [12, 13, 14, 16, 17, 18, 7, 20, 21, 22]
