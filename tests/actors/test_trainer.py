"""Trainer ranks in Ray actors: what one rank and two ranks compute, and what a checkpoint restores."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.actors.trainer import TrainerGroup
from fewstep.actors.trainer_rank import _micro_batches
from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.model.transformer import Transformer
from fewstep.kernels.rows import RowBatch, SampleRows, load_samples
from fewstep.platform.errors import ActorDied, ResourceError, UserError

pytestmark = pytest.mark.ray

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, max_position_embeddings=64, block_size=4, mask_token_id=2, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
OBJECTIVE = "fewstep.pipelines.objectives.denoise:Denoise"


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


def _samples(seed: int, count: int = 8) -> list[SampleRows]:
    draws = np.random.Generator(np.random.Philox(seed))
    samples = []
    for _ in range(count):
        length = 4 * int(draws.integers(2, 5))
        tokens = draws.integers(3, 40, length)
        rows = SampleRows.clean(tokens)
        rows.add_state(
            np.where(np.arange(length) % 2 == 0, 2, tokens), np.arange(length),
            np.where(np.arange(length) % 2 == 0, tokens, -1), np.where(np.arange(length) % 2 == 0, 1.0 / 64, 0.0),
        )  # fmt: skip
        samples.append(rows)
    return samples


def _train(
    settings: TrainerSettings, steps: int = 4, count: int = 8
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights."""
    group = TrainerGroup(CONFIG, 7, settings, OBJECTIVE, num_cpus=0.5)
    try:
        metrics = [group.update(_samples(step, count), 1e-2) for step in range(steps)]
        return [m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], group.state()
    finally:
        group.close()


def test_two_ranks_compute_what_one_does() -> None:
    one_losses, one_norms, one = _train(TrainerSettings())
    two_losses, two_norms, two = _train(TrainerSettings(num_ranks=2))
    assert one_losses == pytest.approx(two_losses, rel=1e-4)
    # Adam forgives a gradient of the wrong size; the norm before clipping does not.
    assert one_norms == pytest.approx(two_norms, rel=1e-3)
    for name, tensor in one.items():
        # Sums in another order differ by rounding, and Adam's first steps magnify what is near zero.
        torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=0, msg=name)


def test_a_sharded_optimiser_changes_nothing() -> None:
    plain_losses, plain_norms, _ = _train(TrainerSettings(num_ranks=2))
    losses, norms, _ = _train(TrainerSettings(num_ranks=2, zero_stage=1))
    assert losses == pytest.approx(plain_losses, rel=1e-3)
    assert norms == pytest.approx(plain_norms, rel=1e-2)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_micro_batches_accumulate_the_same_gradient(num_ranks: int) -> None:
    """At 256 rows the ranks' shares fall into several micro-batches, not equally many."""
    assert len(_micro_batches(_samples(0, 33), 256)) > 2
    whole, whole_norms, _ = _train(TrainerSettings(num_ranks=num_ranks, micro_rows=100_000), count=33)
    pieces, norms, _ = _train(TrainerSettings(num_ranks=num_ranks, micro_rows=256), count=33)
    assert whole == pytest.approx(pieces, rel=1e-4)
    assert whole_norms == pytest.approx(norms, rel=1e-3)


def test_a_checkpoint_restores_every_bit(tmp_path: Path) -> None:
    settings = TrainerSettings(ema_decay=0.9)
    group = TrainerGroup(CONFIG, 7, settings, OBJECTIVE, num_cpus=0.5)
    other = TrainerGroup(CONFIG, 8, settings, OBJECTIVE, num_cpus=0.5)
    try:
        for step in range(3):
            group.update(_samples(step), 1e-2)
        group.save(tmp_path)
        expected = [group.update(_samples(step), 1e-2)["loss"] for step in range(3, 6)]
        other.load(tmp_path)
        assert [other.update(_samples(step), 1e-2)["loss"] for step in range(3, 6)] == expected
        for name, tensor in group.state().items():
            assert torch.equal(tensor, other.state()[name]), name
    finally:
        group.close()
        other.close()


def test_training_lowers_the_loss() -> None:
    group = TrainerGroup(CONFIG, 7, TrainerSettings(), OBJECTIVE, num_cpus=0.5)
    try:
        losses = [group.update(_samples(0), 1e-2)["loss"] for _ in range(30)]
    finally:
        group.close()
    assert losses[-1] < 0.5 * losses[0]


def test_a_dead_rank_is_named_with_its_cause() -> None:
    group = TrainerGroup(CONFIG, 7, TrainerSettings(), OBJECTIVE, num_cpus=0.5)
    try:
        os.kill(group.pids()[0], signal.SIGKILL)
        with pytest.raises(
            ActorDied,
            match=r"trainer rank 0 died: its process \(pid \d+\) was killed or crashed .*; its last phase: update",
        ):
            group.update(_samples(0), 1e-2)
    finally:
        group.close()


def test_the_rank_that_died_is_named_and_not_the_one_that_waited_for_it() -> None:
    group = TrainerGroup(CONFIG, 7, TrainerSettings(num_ranks=2), OBJECTIVE, num_cpus=0.5)
    try:
        os.kill(group.pids()[1], signal.SIGKILL)
        with pytest.raises(ActorDied, match="trainer rank 1 died: its process"):
            group.update(_samples(0), 1e-2)
    finally:
        group.close()


def test_more_ranks_than_the_cluster_has_room_for_are_refused_at_once() -> None:
    with pytest.raises(ResourceError, match="trainer ranks: got 9 x 1 CPU; allowed: at most"):
        TrainerGroup(CONFIG, 7, TrainerSettings(num_ranks=9), OBJECTIVE)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_logprobs_are_of_the_weights_that_are_asked_for(num_ranks: int) -> None:
    """One rank or two, padded batches or not: the same numbers; the reference stays where training started."""
    samples = _samples(3, 7)
    group = TrainerGroup(CONFIG, 7, TrainerSettings(num_ranks=num_ranks), OBJECTIVE, num_cpus=0.5)
    try:
        first = group.logprobs(samples, "current")
        assert all(len(values) == len(s.tokens) for values, s in zip(first, samples, strict=True))
        group.update(_samples(0), 1e-2)
        moved, reference = group.logprobs(samples, "current"), group.logprobs(samples, "reference")
    finally:
        group.close()
    model = Transformer(CONFIG)
    model.initialise(7)
    for sample, before, after, frozen in zip(samples, first, moved, reference, strict=True):
        rows = RowTensors.of(RowBatch.collate([sample]))
        with torch.no_grad():
            expected, _ = TrainingModel(model)(
                rows.tokens, rows.positions, rows.copies, rows.target_rows, rows.targets, CONFIG.block_size
            )
        asked = sample.targets >= 0
        np.testing.assert_allclose(before[asked], expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(frozen[asked], expected.numpy(), atol=1e-5)
        assert (before[~asked] == 0.0).all()
        assert np.abs(after[asked] - before[asked]).max() > 1e-3


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_step_without_a_finite_gradient_changes_nothing_and_too_many_keep_the_batch(
    zero_stage: int, tmp_path: Path
) -> None:
    settings = TrainerSettings(
        num_ranks=1 + zero_stage, zero_stage=zero_stage, ema_decay=0.9, max_skipped_steps=1
    )
    poisoned = _samples(1)
    poisoned[3].weights[-2] = np.nan
    finals = []
    for bad in (False, True):
        group = TrainerGroup(CONFIG, 7, settings, OBJECTIVE, num_cpus=0.5, replay=tmp_path / "batch.npz")
        try:
            group.update(_samples(0), 1e-2)
            if bad:
                before = group.state()
                assert group.update(poisoned, 1e-2)["skipped"] == 1.0
                assert all(torch.equal(before[name], tensor) for name, tensor in group.state().items())
            assert group.update(_samples(2), 1e-2)["skipped"] == 0.0
            finals.append(group.state())
            if bad:
                group.update(poisoned, 1e-2)
                with pytest.raises(UserError, match=r"2 steps in a row.*batch\.npz"):
                    group.update(poisoned, 1e-2)
        finally:
            group.close()
    assert all(torch.equal(finals[0][name], tensor) for name, tensor in finals[1].items())
    for kept, sample in zip(load_samples(tmp_path / "batch.npz"), poisoned, strict=True):
        np.testing.assert_equal(kept.weights, sample.weights)
        np.testing.assert_equal((kept.tokens, kept.documents), (sample.tokens, sample.documents))
