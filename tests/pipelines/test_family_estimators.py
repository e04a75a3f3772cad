"""Rollouts of every family that the engine serves, shown to the trainer again: the same states, the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bench.small_checkpoints import CONFIGS, write_small

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.rows import NO_TARGET, RowBatch
from fewstep.pipelines.estimators import Terms, TrajectoryEstimator, clean_rows
from fewstep.platform.records import DecodePolicy, WeightVersion
from fewstep.platform.rng import generator

SERVED = ("llada", "dream", "sdar", "fast_dllm_v2", "llada2", "stable_diffcoder")


@pytest.mark.parametrize("name", SERVED)
def test_rounds_rebuild_what_the_engine_saw(name: str, tmp_path: Path) -> None:
    """Every written token is supervised once, and its log-probability is the one recorded when it was written."""
    model, tokenizer = load_model(write_small(tmp_path, CONFIGS[name]))
    config, draws = model.config, generator("prompts")
    size = 4 if config.attention_kind == "bidirectional" else None
    policies = [
        DecodePolicy(kind="static", tokens_per_step=3, block_size=size, temperature=1.0, seed=1),
        DecodePolicy(threshold=0.3, block_size=size, temperature=0.7, seed=2),
        DecodePolicy(kind="entropy_bound", entropy_bound=1.0, block_size=size),
    ]
    # Prompts that end inside a block and at its edge, where the first mask is predicted from the block before.
    prompts = [tuple(int(t) for t in draws.integers(3, 90, length)) for length in (3, 8, 13, 16)]
    requests = [
        Request(f"{i}-{j}", prompt, policy, max_tokens=21)
        for i, prompt in enumerate(prompts)
        for j, policy in enumerate(policies)
    ]
    engine = Engine(model, tokenizer, weight_version=WeightVersion("test", 0, ""))
    training = TrainingModel(model)
    for trajectory in engine.generate(requests):
        rows = clean_rows(trajectory)
        terms = Terms(config.sees_block, config.mask_token_id, 1.0, 0.5)
        TrajectoryEstimator(max_states=1000).add_states(rows, trajectory, terms, generator("t"))
        if config.attention_kind == "bidirectional":
            rows = rows.states_only()
        chosen = ~np.isnan(trajectory.logprob)
        assert (rows.targets != NO_TARGET).sum() == chosen.sum()
        tensors = RowTensors.of(RowBatch.collate([rows]))
        with torch.no_grad():
            logprob, _ = training(
                tensors.tokens, tensors.positions, tensors.copies, tensors.target_rows, tensors.targets,
                config.sees_block,
            )  # fmt: skip
        torch.testing.assert_close(logprob, tensors.extras["old_logprob"], atol=2e-4, rtol=1e-4)
