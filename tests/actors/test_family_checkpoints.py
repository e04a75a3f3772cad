"""Another project's bfloat16 checkpoint through the parts of a refinement: ranks train it, replicas prove it, it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.small_checkpoints import CONFIGS, MASK, write_small

from fewstep.actors.engine.request import Request
from fewstep.actors.replica_pool import ReplicaPool, ReplicaSettings
from fewstep.actors.trainer import TrainerGroup
from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import load_state, save_model, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.shards import ShardedTensors
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.kernels.rows import NO_TARGET, SampleRows
from fewstep.platform.records import DecodePolicy, WeightVersion

pytestmark = pytest.mark.ray

SEQUENCE = np.arange(16, dtype=np.int64) * 5 + 4


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(num_cpus=3):
        yield


def sample() -> SampleRows:
    masked = (np.arange(16) % 3 != 0) & (np.arange(16) >= 4)
    rows = SampleRows.clean(SEQUENCE)
    rows.add_state(
        np.where(masked, MASK, SEQUENCE),
        np.arange(16),
        np.where(masked, SEQUENCE, NO_TARGET),
        masked.astype(np.float32) / masked.sum(),
    )
    return rows


@pytest.mark.parametrize("name", ["dream", "llada2"])
def test_trained_pushed_proved_and_saved_in_its_own_format(name: str, tmp_path: Path) -> None:
    folder = write_small(tmp_path / "source", CONFIGS[name], dtype=torch.bfloat16)
    config = ModelConfig.load(folder)
    settings = TrainerSettings(gradient_checkpointing=True)
    group = TrainerGroup(
        config, folder, settings, "fewstep.pipelines.objectives.denoise:Denoise", num_cpus=0.5
    )
    try:
        losses = [group.update([sample()], 1e-2)["loss"] for _ in range(6)]
        state = group.state()
    finally:
        group.close()
    assert losses[-1] < 0.6 * losses[0]
    with ReplicaPool(
        folder, 1, run_id="test", settings=ReplicaSettings(num_cpus=0.5, dtype="float32")
    ) as pool:
        receipt = pool.push(state, WeightVersion("test", 6, state_checksum(state)))
        assert (len(receipt.echoes), dict(receipt.failures)) == (1, {})
        policy = DecodePolicy(block_size=4 if config.attention_kind == "bidirectional" else None)
        answer = pool.generate([Request("a", (7, 3, 90), policy, max_tokens=9, ignore_eos=True)])[0]
        assert answer.num_tokens == 9
    save_model(tmp_path / "trained", state, config, load_tokenizer(folder, config), source=folder)
    before, after = ShardedTensors(folder), ShardedTensors(tmp_path / "trained")
    assert after.entries == before.entries  # names, shapes, types and the split into files
    assert (tmp_path / "trained" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    rounded = {n: t if n.endswith("router.bias") else t.bfloat16() for n, t in state.items()}
    assert state_checksum(load_state(tmp_path / "trained", config)) == state_checksum(rounded)
