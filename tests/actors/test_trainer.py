"""Trainer ranks in Ray actors: what one rank and two ranks compute, and what a checkpoint restores."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.actors.training_samples import every_second_masked

from fewstep.actors.trainer import TrainerGroup
from fewstep.actors.trainer_rank import TrainerRank, _micro_batches
from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.model.transformer import Transformer
from fewstep.kernels.rows import RowBatch, SampleRows, load_samples
from fewstep.pipelines.settings import PretrainConfig
from fewstep.pipelines.tasks.vocabulary import build_tokenizer
from fewstep.platform.config import load_config
from fewstep.platform.errors import ActorDied, CheckpointError, ConfigError, ResourceError, UserError

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
    texts = [draws.integers(3, 40, 4 * int(draws.integers(2, 5))) for _ in range(count)]
    return [every_second_masked(text, CONFIG.mask_token_id, 1.0 / 64) for text in texts]


def _poisoned(seed: int) -> list[SampleRows]:
    samples = _samples(seed)
    samples[3].weights[-2] = np.nan
    return samples


Run = tuple[list[float], list[float], dict[str, torch.Tensor]]


def _train(settings: TrainerSettings, steps: int = 4, count: int = 8) -> Run:
    """Losses, gradient norms and final weights; the second step sees other blocks than the model's."""
    group = TrainerGroup(CONFIG, 7, settings, OBJECTIVE, num_cpus=0.25)
    try:
        metrics = [
            group.update(_samples(step, count), 1e-2, block_size=2 if step == 1 else None)
            for step in range(steps)
        ]
        return [m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], group.state()
    finally:
        group.close()


@pytest.fixture(scope="module")
def plain() -> Run:
    """One rank, nothing sharded."""
    return _train(TrainerSettings(), count=17)


@pytest.mark.parametrize(
    ("zero_stage", "num_ranks"), [(0, 2), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
)  # fmt: skip
def test_every_stage_and_number_of_ranks_computes_the_same(
    plain: Run, zero_stage: int, num_ranks: int
) -> None:
    """At 256 rows the ranks' shares fall into several micro-batches, not equally many."""
    counts = {len(_micro_batches(_samples(0, 17)[rank::2], 256)) for rank in range(2)}
    assert counts == {1, 2}
    losses, norms, weights = _train(
        TrainerSettings(num_ranks=num_ranks, zero_stage=zero_stage, micro_rows=256), count=17
    )
    assert losses == pytest.approx(plain[0], rel=1e-4)
    # Adam forgives a gradient of the wrong size; the norm before clipping does not.
    assert norms == pytest.approx(plain[1], rel=1e-3)
    assert weights.keys() == plain[2].keys()
    for name, tensor in plain[2].items():
        # Sums in another order differ by rounding, and Adam's first steps magnify what is near zero.
        torch.testing.assert_close(weights[name], tensor, atol=5e-4, rtol=0, msg=name)


def test_sharded_weights_go_with_bf16_and_gradient_checkpointing() -> None:
    whole, norms, _ = _train(TrainerSettings(precision="bf16"), steps=2)
    settings = TrainerSettings(
        num_ranks=2, zero_stage=3, precision="bf16", gradient_checkpointing=True, micro_rows=256
    )
    losses, sharded_norms, _ = _train(settings, steps=2)
    assert losses == pytest.approx(whole, rel=1e-3)
    assert sharded_norms == pytest.approx(norms, rel=1e-2)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_checkpoint_restores_every_bit_and_another_number_of_ranks_can_go_on(
    zero_stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that goes on meets a gradient that is not finite, the one that is restored does not."""
    settings = TrainerSettings(
        num_ranks=2, zero_stage=zero_stage, ema_decay=0.9, weight_decay=0.1, micro_rows=256
    )
    group = TrainerGroup(CONFIG, 7, settings, OBJECTIVE, num_cpus=0.25)
    other = TrainerGroup(CONFIG, 8, settings, OBJECTIVE, num_cpus=0.25)
    try:
        for step in range(3):
            group.update(_samples(step), 1e-2)
        group.save(tmp_path)
        assert group.update(_poisoned(1), 1e-2)["skipped"] == 1.0
        expected = [group.update(_samples(step), 1e-2)["loss"] for step in range(3, 6)]
        other.load(tmp_path)
        assert [other.update(_samples(step), 1e-2)["loss"] for step in range(3, 6)] == expected
        weights, restored = group.state(), other.state()
        for name, tensor in weights.items():
            assert torch.equal(tensor, restored[name]), name
    finally:
        group.close()
        other.close()
    assert capsys.readouterr().out == ""
    files = sorted(tmp_path.rglob("*"))
    alone = TrainerGroup(CONFIG, 9, settings.model_copy(update={"num_ranks": 1}), OBJECTIVE, num_cpus=0.25)
    try:
        alone.load(tmp_path)
        losses = [alone.update(_samples(step), 1e-2)["loss"] for step in range(3, 6)]
        weights_of_one = alone.state()
    finally:
        alone.close()
    how = "converted" if zero_stage else "read as it is"
    assert capsys.readouterr().out == f"checkpoint of 2 trainer ranks, {how} for 1\n"
    assert sorted(tmp_path.rglob("*")) == files
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(weights_of_one[name], tensor, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_damaged_shard_is_named_at_once_and_nothing_of_a_killed_conversion_stays(
    num_ranks: int, tmp_path: Path
) -> None:
    """Read as it is, and converted for another number of ranks."""
    folder, left_behind = tmp_path / "checkpoint", tmp_path / "checkpoint.universal"
    settings = TrainerSettings(num_ranks=2, zero_stage=2)
    group = TrainerGroup(CONFIG, 7, settings, OBJECTIVE, num_cpus=0.25)
    try:
        group.update(_samples(0), 1e-2)
        group.save(folder)
        left_behind.mkdir()
        group.load(folder)
        assert not left_behind.exists()
        shard = min(folder.rglob("*rank_1*optim_states.pt"))
        shard.write_bytes(shard.read_bytes()[:1000])
        if num_ranks != 2:
            group.close()
            group = TrainerGroup(
                CONFIG, 7, settings.model_copy(update={"num_ranks": num_ranks}), OBJECTIVE, num_cpus=0.25
            )
        started = time.monotonic()
        with pytest.raises(CheckpointError, match="a finished checkpoint holds") as caught:
            group.load(folder)
        assert time.monotonic() - started < settings.deadline_s / 4
    finally:
        group.close()
    assert "resume=false" in str(caught.value)
    assert "\n" not in str(caught.value)


class Watched(TrainerRank):
    """A rank that can say how many elements of weights it holds."""

    def held(self) -> int:
        return sum(parameter.data.numel() for parameter in self._model.parameters())

    def most_held(self, samples: list[SampleRows]) -> int:
        """The most at the end of any module's forward or backward, in one step."""
        seen: list[int] = []
        for module in self._model.modules():
            module.register_forward_hook(lambda *_: seen.append(self.held()))
            module.register_full_backward_hook(lambda *_: seen.append(self.held()))
        self.update(samples, 1e-2)
        return max(seen)


@pytest.mark.parametrize("from_folder", [False, True])
def test_at_stage_3_no_rank_holds_the_whole_model(from_folder: bool, tmp_path: Path) -> None:
    import ray

    config = CONFIG.model_copy(update={"num_hidden_layers": 8})
    model = Transformer(config)
    model.initialise(7)
    initial: Path | int = 7
    if from_folder:
        save_model(tmp_path / "model", model.state_dict(), config, build_tokenizer())
        initial = tmp_path / "model"
    total = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    settings = TrainerSettings(num_ranks=2, zero_stage=3)
    actor = ray.remote(num_cpus=0.25)(Watched)
    ranks = [actor.remote(config, initial, settings, OBJECTIVE, {}) for _ in range(2)]
    try:
        address, port = ray.get(ranks[0].endpoint.remote())
        ray.get([rank.connect.remote(index, address, port) for index, rank in enumerate(ranks)])
        assert max(ray.get([rank.held.remote() for rank in ranks])) <= vectors
        states = ray.get([rank.state.remote() for rank in ranks])
        assert states[1] == {}
        for name, tensor in model.state_dict().items():
            assert torch.equal(states[0][name], tensor), name
        most = ray.get([rank.most_held.remote(_samples(0)) for rank in ranks])
    finally:
        for rank in ranks:
            ray.kill(rank)
    # The embedding is the tied head as well, and so there all the time.
    assert max(most) <= 3 * layer + model.embed_tokens.weight.numel() + vectors < 0.5 * total


def test_sharded_weights_are_not_compiled() -> None:
    with pytest.raises(
        ConfigError, match=r"zero_stage 3 does not go with compiled: set trainer\.compiled=false"
    ):
        load_config(PretrainConfig, None, ["trainer.zero_stage=3"])


def test_training_lowers_the_loss() -> None:
    group = TrainerGroup(CONFIG, 7, TrainerSettings(), OBJECTIVE, num_cpus=0.25)
    try:
        losses = [group.update(_samples(0), 1e-2)["loss"] for _ in range(30)]
    finally:
        group.close()
    assert losses[-1] < 0.5 * losses[0]


def test_a_dead_rank_is_named_with_its_cause() -> None:
    group = TrainerGroup(CONFIG, 7, TrainerSettings(), OBJECTIVE, num_cpus=0.25)
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
    group = TrainerGroup(CONFIG, 7, TrainerSettings(num_ranks=2), OBJECTIVE, num_cpus=0.25)
    try:
        os.kill(group.pids()[1], signal.SIGKILL)
        with pytest.raises(ActorDied, match="trainer rank 1 died: its process"):
            group.update(_samples(0), 1e-2)
    finally:
        group.close()


def test_more_ranks_than_the_cluster_has_room_for_are_refused_at_once() -> None:
    with pytest.raises(ResourceError, match="trainer ranks: got 9 x 1 CPU; allowed: at most"):
        TrainerGroup(CONFIG, 7, TrainerSettings(num_ranks=9), OBJECTIVE)


@pytest.mark.parametrize(
    ("num_ranks", "zero_stage", "tied"), [(1, 0, True), (2, 0, True), (2, 3, True), (2, 3, False)]
)
def test_logprobs_are_of_the_weights_that_are_asked_for(num_ranks: int, zero_stage: int, tied: bool) -> None:
    """One rank or two, padded batches or not: the same numbers; the reference stays where training started."""
    samples, config = _samples(3, 7), CONFIG.model_copy(update={"tie_word_embeddings": tied})
    settings = TrainerSettings(num_ranks=num_ranks, zero_stage=zero_stage, micro_rows=256)
    group = TrainerGroup(config, 7, settings, OBJECTIVE, num_cpus=0.25)
    try:
        first = group.logprobs(samples, "current")
        # Fewer than there are ranks, or groups that are not equally many.
        np.testing.assert_allclose(group.logprobs(samples[:1], "current")[0], first[0], atol=1e-5)
        assert all(len(values) == len(s.tokens) for values, s in zip(first, samples, strict=True))
        group.update(_samples(0), 1e-2)
        moved, reference = group.logprobs(samples, "current"), group.logprobs(samples, "reference")
    finally:
        group.close()
    model = Transformer(config)
    model.initialise(7)
    for sample, before, after, frozen in zip(samples, first, moved, reference, strict=True):
        rows = RowTensors.of(RowBatch.collate([sample]))
        with torch.no_grad():
            expected, _ = TrainingModel(model)(
                rows.tokens, rows.positions, rows.copies, rows.target_rows, rows.targets, config.block_size
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
    poisoned = _poisoned(1)
    finals = []
    for bad in (False, True):
        group = TrainerGroup(CONFIG, 7, settings, OBJECTIVE, num_cpus=0.25, replay=tmp_path / "batch.npz")
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
