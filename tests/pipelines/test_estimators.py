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
from fewstep.pipelines.estimators import (
    SHARE,
    CompressedEstimator,
    CoupledEstimator,
    Terms,
    TrajectoryEstimator,
    clean_rows,
    slices,
)
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


@pytest.mark.parametrize("shrink", [2, 3])
def test_shrinking_merges_neighbouring_rounds(trajectories: list[Trajectory], shrink: int) -> None:
    """Every chosen token is still asked for once, from a state no later than its own, in fewer rounds."""
    for trajectory in trajectories:
        view = slices(trajectory, 8)
        rows = clean_rows(trajectory)
        TrajectoryEstimator(1000, shrink).add_states(rows, trajectory, Terms(8, 2, 1.0, 0.5), generator("s"))
        assert int(rows.copies.max()) == -(-view.num_rounds // shrink)
        assert (rows.targets != NO_TARGET).sum() == view.chosen.sum()
        local = {int(p): int(step) for p, step in zip(view.positions, view.local_step, strict=True)}
        order = {}
        for row in np.flatnonzero(rows.targets != NO_TARGET):
            order.setdefault(int(rows.copies[row]), set()).add(local[int(rows.positions[row])] // shrink)
        assert all(len(rounds) == 1 for rounds in order.values())
    assert TrajectoryEstimator(4, 1).recorded
    assert not TrajectoryEstimator(4, shrink).recorded


def test_coupled_masks_ask_for_every_token_once_in_a_pair(trajectories: list[Trajectory]) -> None:
    for pairs in (1, 2):
        for trajectory in trajectories:
            estimator = CoupledEstimator(pairs)
            rows = clean_rows(trajectory, estimator.extras)
            cost = estimator.add_states(rows, trajectory, Terms(8, 2, 0.25, 0.5), generator("c", pairs))
            assert cost == (rows.copies > 0).sum()
            chosen = {len(trajectory.prompt_ids) + i for i in np.flatnonzero(~np.isnan(trajectory.logprob))}
            asked = rows.targets != NO_TARGET
            count = {position: int((asked & (rows.positions == position)).sum()) for position in chosen}
            assert set(rows.positions[asked].tolist()) == chosen
            assert set(count.values()) == {1 + pairs}
            # Half of a token's weight lies on the first state; the loss weight lies there whole.
            first = asked & (rows.copies == 1)
            assert (rows.extras[SHARE][first] == 0.5).all()
            assert (rows.weights[first] == 0.25).all()
            assert (rows.weights[asked & (rows.copies > 1)] == 0.0).all()
            hidden = rows.tokens == 2
            assert hidden[asked].all()
            # What is not masked is shown as it ended.
            ended = dict(zip(range(10**6), [*trajectory.prompt_ids, *trajectory.canvas_ids], strict=False))
            shown = (rows.copies > 0) & ~hidden
            assert all(rows.tokens[row] == ended[int(rows.positions[row])] for row in np.flatnonzero(shown))


def test_a_masks_rate_is_undone_by_its_weight(trajectories: list[Trajectory]) -> None:
    """A token is in M with probability r and weighs 1/r there, else 1/(1-r) outside: over draws w has mean 2, one for
    each state of the pair, and its share half of that."""
    trajectory, means = trajectories[1], []
    for number in range(300):
        estimator = CoupledEstimator(1)
        rows = clean_rows(trajectory, estimator.extras)
        estimator.add_states(rows, trajectory, Terms(8, 2, 1.0, 1.0), generator("u", number))
        later = (rows.targets != NO_TARGET) & (rows.copies > 1)
        means.append(rows.extras[SHARE][later].mean())
    assert np.mean(means) == pytest.approx(1.0, abs=0.05)
