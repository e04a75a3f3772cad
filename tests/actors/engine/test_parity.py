"""What the trainer would recompute from a trajectory is what the engine recorded."""

from __future__ import annotations

import random

import numpy as np
import torch
from tests.actors.engine.plain_loop import MASK, build_model, draw_request, engine_of

from fewstep.kernels.attention import visibility
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.kernels.rows import RowBatch, SampleRows
from fewstep.platform.records import Trajectory


def states_of(trajectory: Trajectory, block_size: int) -> SampleRows:
    """The clean sequence and, for every step, the live block as that step saw it."""
    prompt = len(trajectory.prompt_ids)
    tokens = np.concatenate((trajectory.prompt_ids, trajectory.canvas_ids)).astype(np.int64)
    steps = np.concatenate((np.full(prompt, -1), trajectory.step_map))
    recorded = np.concatenate((np.full(prompt, np.nan), trajectory.logprob))
    # A position without a step is behind the end that counts and was a mask in every state.
    steps[prompt:][steps[prompt:] < 0] = np.iinfo(np.int16).max
    sample = SampleRows.clean(tokens, ("recorded",))
    for step in range(trajectory.forwards):
        block = int(np.flatnonzero(steps == step)[0]) // block_size
        where = np.arange(block * block_size, (block + 1) * block_size)
        target = (steps[where] == step) & ~np.isnan(recorded[where])
        sample.add_state(
            np.where(steps[where] < step, tokens[where], MASK),
            where,
            np.where(target, tokens[where], -1),
            target.astype(np.float32),
            recorded=np.where(target, recorded[where], 0.0),
        )
    return sample


def recompute(model: Transformer, batch: RowBatch) -> tuple[np.ndarray, np.ndarray]:
    """(recomputed, recorded) log-probabilities of every committed token in the batch."""
    positions, copies = torch.from_numpy(batch.positions), torch.from_numpy(batch.copies)
    attention = masked_attention(visibility(positions, copies, model.config.block_size))
    with torch.no_grad():
        logprobs = model.logits(model(torch.from_numpy(batch.tokens), positions, attention)).log_softmax(-1)
    targets = torch.from_numpy(batch.targets)
    chosen = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0].numpy()
    rows = batch.weights > 0
    return chosen[rows], batch.extras["recorded"][rows]


def test_log_probabilities_recomputed_from_the_step_map_equal_the_recorded_ones() -> None:
    rng = random.Random(23)
    model, engine = build_model(), engine_of(max_sequences=5)
    trajectories = engine.generate([draw_request(rng, str(i)) for i in range(24)])
    samples = [states_of(trajectory, model.config.block_size) for trajectory in trajectories]
    recomputed, recorded = recompute(model, RowBatch.collate(samples))
    assert len(recorded) == sum(int((~np.isnan(t.logprob)).sum()) for t in trajectories) > 300
    np.testing.assert_allclose(recomputed, recorded, atol=1e-4)


def test_the_parity_check_sees_a_wrong_step() -> None:
    rng = random.Random(23)
    model, engine = build_model(), engine_of()
    trajectory = max(
        engine.generate([draw_request(rng, str(i)) for i in range(10)]), key=lambda one: one.forwards
    )
    first, second = np.flatnonzero(trajectory.step_map == 1)[0], np.flatnonzero(trajectory.step_map == 2)[0]
    trajectory.step_map[[first, second]] = trajectory.step_map[[second, first]]
    recomputed, recorded = recompute(
        model, RowBatch.collate([states_of(trajectory, model.config.block_size)])
    )
    assert np.abs(recomputed - recorded).max() > 1e-3
