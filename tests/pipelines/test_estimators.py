"""Estimators against the engine's own record: the states are rebuilt exactly or the ratio means nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.model.transformer import Transformer
from fewstep.kernels.rows import NO_TARGET, RowBatch
from fewstep.pipelines.estimators import CompressedEstimator, Terms, TrajectoryEstimator, clean_rows, slices
from fewstep.pipelines.tasks.family import tasks
from fewstep.pipelines.tasks.vocabulary import EOS, MASK, PAD, build_tokenizer
from fewstep.platform.records import DecodePolicy, Trajectory, WeightVersion
from fewstep.platform.rng import generator

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        vocab_size=TOKENIZER.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=48, max_position_embeddings=128, block_size=8,
        mask_token_id=TOKENIZER.token_to_id(MASK), eos_token_id=TOKENIZER.token_to_id(EOS),
        pad_token_id=TOKENIZER.token_to_id(PAD),
    )  # fmt: skip
    transformer = Transformer(config)
    transformer.initialise(1)
    return transformer.eval()


@pytest.fixture(scope="module")
def trajectories(model: Transformer) -> list[Trajectory]:
    engine = Engine(model, TOKENIZER, weight_version=WeightVersion("test", 0, ""))
    policies = [
        DecodePolicy(kind="static", tokens_per_step=3, temperature=1.0, seed=1),
        DecodePolicy(kind="static", tokens_per_step=8, temperature=1.0, seed=2),
        DecodePolicy(kind="threshold", threshold=0.012, temperature=1.0, seed=3),
        DecodePolicy(kind="static", tokens_per_step=1),
    ]
    requests = [
        Request(f"{i}", tuple(TOKENIZER.encode(task.prompt).ids), policies[i % 4], max_tokens=40)
        for i, task in enumerate(tasks(8, 0, held_out=True))
    ]
    return engine.generate(requests)


def test_rounds_rebuild_what_the_engine_saw(model: Transformer, trajectories: list[Trajectory]) -> None:
    """All rounds together supervise each chosen token once, and the trainer's log-probability is the recorded one."""
    training = TrainingModel(model)
    for trajectory in trajectories:
        rows = clean_rows(trajectory)
        TrajectoryEstimator(max_states=1000).add_states(
            rows, trajectory, Terms(8, model.config.mask_token_id, 1.0, 0.5), generator("t")
        )
        chosen = ~np.isnan(trajectory.logprob)
        assert (rows.targets != NO_TARGET).sum() == chosen.sum()
        tensors = RowTensors.of(RowBatch.collate([rows]))
        with torch.no_grad():
            logprob, _ = training(
                tensors.tokens, tensors.positions, tensors.copies, tensors.target_rows, tensors.targets, 8
            )
        torch.testing.assert_close(logprob, tensors.extras["old_logprob"], atol=2e-4, rtol=1e-4)
        assert (tensors.extras["advantage"] == 0.5).all()


def test_kept_rounds_are_scaled_up(trajectories: list[Trajectory]) -> None:
    trajectory = trajectories[0]
    rounds = slices(trajectory, 8).num_rounds
    rows = clean_rows(trajectory)
    TrajectoryEstimator(max_states=1).add_states(rows, trajectory, Terms(8, 2, 1.0, 1.0), generator("k"))
    assert rounds > 1
    assert rows.weights.max() == pytest.approx(rounds)


def test_compressed_transitions_start_from_everything_masked(trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        rows = clean_rows(trajectory)
        CompressedEstimator().add_states(rows, trajectory, Terms(8, 2, 1.0, 0.0), generator("c"))
        first = rows.copies == 1
        generated = rows.positions[first] >= len(trajectory.prompt_ids)
        assert (rows.tokens[first][generated] == 2).all()
        assert (rows.targets[first] != NO_TARGET).sum() == (~np.isnan(trajectory.logprob)).sum()
        later = rows.copies == 2
        assert later.any() == (slices(trajectory, 8).num_rounds > 1)
        hidden = rows.tokens[later] == 2
        assert (rows.targets[later][~hidden] == NO_TARGET).all()
        assert hidden.sum() <= generated.sum()
