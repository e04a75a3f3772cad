"""Training an adapter: what moves and what stays, what a checkpoint holds, and that the weights served are those trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.actors.training_samples import every_second_masked

from fewstep.actors.trainer import TrainerGroup
from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.lora import DOWN, UP, Lora
from fewstep.kernels.model.lora_settings import LoraSettings
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.rows import RowBatch, SampleRows

pytestmark = pytest.mark.ray

FOLDER = embedded_model()
CONFIG = ModelConfig.load(FOLDER)
LORA = LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "down_proj"))
OBJECTIVE = "fewstep.pipelines.objectives.denoise:Denoise"


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


def _samples(seed: int, count: int = 8) -> list[SampleRows]:
    draws = np.random.Generator(np.random.Philox(seed))
    texts = [draws.integers(4, 60, 32) for _ in range(count)]
    return [every_second_masked(text, CONFIG.mask_token_id, 1.0 / 128) for text in texts]


def _group(**settings: Any) -> TrainerGroup:
    return TrainerGroup(
        CONFIG, FOLDER, TrainerSettings(**{"lora": LORA, **settings}), OBJECTIVE, num_cpus=0.5
    )


def _train(steps: int = 4, **settings: Any) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms, and the adapter."""
    group = _group(**settings)
    try:
        metrics = [group.update(_samples(step), 1e-2) for step in range(steps)]
        return [m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], group.adapter()
    finally:
        group.close()


def _logprobs(state: Mapping[str, torch.Tensor], samples: list[SampleRows]) -> list[np.ndarray[Any, Any]]:
    model, _ = load_model(FOLDER)
    model.load_state_dict(dict(state))
    found = []
    for sample in samples:
        rows = RowTensors.of(RowBatch.collate([sample]))
        with torch.no_grad():
            values, _ = TrainingModel(model)(
                rows.tokens, rows.positions, rows.copies, rows.target_rows, rows.targets, CONFIG.block_size
            )
        found.append(values.numpy())
    return found


def test_what_is_served_is_what_was_trained_and_the_reference_is_the_base() -> None:
    """Log-probabilities under the merged weights are the trainer's; every tensor that is no target stays bit for bit."""
    samples, base = _samples(9), load_model(FOLDER)[0].state_dict()
    group = _group()
    try:
        assert all(torch.equal(base[name], tensor) for name, tensor in group.state().items())
        for step in range(3):
            group.update(_samples(step), 1e-2)
        state, adapter = group.state(), group.adapter()
        current, reference = group.logprobs(samples, "current"), group.logprobs(samples, "reference")
        # Asking the reference leaves the adapter where it was.
        again = group.logprobs(samples, "current")
    finally:
        group.close()
    changed = {name for name, tensor in state.items() if not torch.equal(base[name], tensor)}
    assert changed == {name for name in base if name.endswith(("q_proj.weight", "down_proj.weight"))}
    name = "layers.1.mlp.down_proj"
    expected = base[f"{name}.weight"] + 2.0 * adapter[name + UP] @ adapter[name + DOWN]
    torch.testing.assert_close(state[f"{name}.weight"], expected)
    for sample, ours, frozen, repeated, merged, plain in zip(
        samples, current, reference, again, _logprobs(state, samples), _logprobs(base, samples), strict=True
    ):
        asked = sample.targets >= 0
        np.testing.assert_allclose(ours[asked], merged, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(frozen[asked], plain, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(ours, repeated)
        assert np.abs(ours - frozen).max() > 1e-2


def test_two_ranks_a_sharded_optimiser_and_checkpointed_layers_compute_what_one_rank_does() -> None:
    losses, norms, adapter = _train()
    assert losses[-1] < losses[0]
    for settings in (
        {"num_ranks": 2},
        {"num_ranks": 2, "zero_stage": 1},
        {"gradient_checkpointing": True},
    ):
        other_losses, other_norms, other = _train(**settings)
        assert other_losses == pytest.approx(losses, rel=1e-3), settings
        assert other_norms == pytest.approx(norms, rel=1e-3), settings
        for name, tensor in adapter.items():
            torch.testing.assert_close(other[name], tensor, atol=2e-3, rtol=0, msg=f"{settings} {name}")


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_checkpoint_is_the_adapter_and_restores_every_bit(zero_stage: int, tmp_path: Path) -> None:
    settings = {
        "lora": LORA.model_copy(update={"dropout": 0.2}), "ema_decay": 0.9, "zero_stage": zero_stage,
        "num_ranks": 1 + zero_stage,
    }  # fmt: skip
    group, other = _group(**settings), _group(**settings)
    try:
        for step in range(2):
            group.update(_samples(step), 1e-2)
        group.save(tmp_path)
        expected = [group.update(_samples(step), 1e-2)["loss"] for step in range(2, 4)]
        other.update(_samples(7), 1e-2)
        other.load(tmp_path)
        assert [other.update(_samples(step), 1e-2)["loss"] for step in range(2, 4)] == expected
        assert all(torch.equal(other.adapter()[name], tensor) for name, tensor in group.adapter().items())
        assert all(torch.equal(other.state()[name], tensor) for name, tensor in group.state().items())
    finally:
        group.close()
        other.close()
    num_trained = sum(parameter.numel() for parameter in Lora(CONFIG, LORA).parameters())
    num_bytes = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    # Parameters, the average, AdamW's two moments and a float32 copy of ZeRO's, in float32, with room for names.
    assert num_bytes < (1 + zero_stage) * (6 * 4 * num_trained + 60_000)
    assert num_bytes < (FOLDER / "model.safetensors").stat().st_size


def test_the_published_adapter_is_the_average() -> None:
    group = _group(ema_decay=0.999)
    try:
        group.update(_samples(0), 1e-2)
        averaged = group.adapter()
    finally:
        group.close()
    _, _, last = _train(1)
    # The warm-up of the average: 2/11 of the first values, 9/11 of those after the first update; B began at zero.
    for name in last:
        if name.endswith(UP):
            torch.testing.assert_close(averaged[name], last[name] * 9 / 11, rtol=1e-4, atol=1e-7)
