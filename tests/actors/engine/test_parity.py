"""A trajectory is enough: every canvas a forward saw is rebuilt from it, and the trainer recomputes what it recorded."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from tests.actors.engine.reference.compare import edits_of
from tests.actors.engine.reference.models import MASK, engine_of, reference_model
from tests.actors.engine.reference.requests import draw_decisive, expected

from fewstep.kernels.attention import visibility
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.kernels.rows import RowBatch, SampleRows
from fewstep.platform.records import Trajectory

Write = tuple[int, int, float]


def writes_of(trajectory: Trajectory) -> list[list[Write]]:
    """(step, token, log-probability) of every write to each position of the canvas, in order of time."""
    last = zip(
        trajectory.step_map.tolist(),
        trajectory.canvas_ids.tolist(),
        trajectory.logprob.tolist(),
        strict=True,
    )
    writes = [[write] if write[0] >= 0 else [] for write in last]
    for position, *lost in edits_of(trajectory):
        writes[position].append(tuple(lost))
    return [sorted(one, key=lambda write: write[0]) for one in writes]


def canvas_before(writes: list[list[Write]], step: int) -> list[int]:
    """The canvas as the forward of a step saw it."""
    return [([MASK] + [token for at, token, _ in one if at < step])[-1] for one in writes]


@pytest.mark.parametrize("kind", ["block_causal", "bidirectional"])
def test_every_canvas_is_rebuilt_from_the_trajectory(kind: str) -> None:
    requests = draw_decisive(random.Random(31), 60, kind)
    edited = 0
    for request, trajectory in zip(requests, engine_of(kind=kind).generate(requests), strict=True):
        writes = writes_of(trajectory)
        for step, state in enumerate(expected(request, kind).states):
            assert canvas_before(writes, step)[: len(state)] == state
        edited += len(trajectory.edit_position)
    assert edited > 20


def states_of(trajectory: Trajectory, block_size: int) -> SampleRows:
    """The clean sequence and, for every step that wrote, the live block as that step saw it."""
    prompt, writes = len(trajectory.prompt_ids), writes_of(trajectory)
    tokens = np.concatenate((trajectory.prompt_ids, trajectory.canvas_ids)).astype(np.int64)
    sample = SampleRows.clean(tokens, ("recorded",))
    for step in sorted({at for one in writes for at, _, _ in one}):
        now = {
            prompt + position: (token, logprob)
            for position, one in enumerate(writes)
            for at, token, logprob in one
            if at == step
        }
        block = min(now) // block_size
        where = np.arange(block * block_size, (block + 1) * block_size)
        state = np.concatenate((trajectory.prompt_ids, canvas_before(writes, step)))[where]
        chosen = {position: write for position, write in now.items() if not math.isnan(write[1])}
        targets = np.array([chosen.get(int(position), (-1, 0.0)) for position in where])
        sample.add_state(
            state.astype(np.int64),
            where,
            targets[:, 0].astype(np.int64),
            (targets[:, 0] >= 0).astype(np.float32),
            recorded=targets[:, 1].astype(np.float32),
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


def trajectories_of(number: int) -> list[Trajectory]:
    requests = [
        dataclasses.replace(request, suffix_ids=()) for request in draw_decisive(random.Random(23), number)
    ]
    return engine_of(max_sequences=5).generate(requests)


def test_log_probabilities_recomputed_from_the_trajectory_equal_the_recorded_ones() -> None:
    trajectories = trajectories_of(30)
    samples = [states_of(trajectory, 8) for trajectory in trajectories]
    recomputed, recorded = recompute(reference_model(), RowBatch.collate(samples))
    written = sum(int((~np.isnan(t.logprob)).sum() + (~np.isnan(t.edit_logprob)).sum()) for t in trajectories)
    assert len(recorded) == written > 300
    assert sum(len(trajectory.edit_position) for trajectory in trajectories) > 20
    np.testing.assert_allclose(recomputed, recorded, atol=1e-4)


def test_the_parity_check_sees_a_wrong_step() -> None:
    plain = [one for one in trajectories_of(30) if not len(one.edit_position)]
    trajectory = max(plain, key=lambda one: one.forwards)
    first, second = np.flatnonzero(trajectory.step_map == 1)[0], np.flatnonzero(trajectory.step_map == 2)[0]
    trajectory.step_map[[first, second]] = trajectory.step_map[[second, first]]
    recomputed, recorded = recompute(reference_model(), RowBatch.collate([states_of(trajectory, 8)]))
    assert np.abs(recomputed - recorded).max() > 1e-3
