"""Objectives: what is credited, and which way the loss pushes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.kernels.model.training import RowTensors
from fewstep.pipelines.objectives.credit import adjacent_surrogate, pairwise_surrogate
from fewstep.pipelines.objectives.denoise import Denoise
from fewstep.pipelines.objectives.distill import Distill
from fewstep.pipelines.objectives.seed import Seed
from fewstep.platform.records import DecodePolicy, Rollout, Trajectory, Verdict


def _rollout(opened: list[int], passed: bool, sample: int = 0) -> Rollout:
    """A rollout whose forward k wrote opened[k] positions."""
    step_map = np.repeat(np.arange(len(opened)), opened).astype(np.int16)
    size = len(step_map)
    trajectory = Trajectory(
        prompt_ids=np.array([3], np.int32), canvas_ids=np.full(size, 5, np.int32), step_map=step_map,
        confidence=np.full(size, 0.9, np.float32), logprob=np.full(size, -0.1, np.float32), num_tokens=size,
        forwards=len(opened), finish_reason="stop", policy=DecodePolicy(), seed=0,
        weight_version_first="a", weight_version_last="a",
    )  # fmt: skip
    verdict = Verdict("passed" if passed else "wrong_answer", float(passed), (passed,), 0.0, "none")
    return Rollout("t", 0, sample, "", trajectory, verdict, 0.0)


@pytest.mark.parametrize(
    ("steps", "expected"), [(2, 1.67), (4, 2.57), (8, 3.66), (16, 4.88), (32, 6.18), (64, 7.52)]
)
def test_pairwise_surrogate_of_even_trajectories_matches_the_table(steps: int, expected: float) -> None:
    assert pairwise_surrogate(_rollout([64 // steps] * steps, True)) == pytest.approx(expected, abs=0.006)


def test_adjacent_surrogate_of_even_trajectories_is_the_number_of_steps() -> None:
    assert adjacent_surrogate(_rollout([4] * 10, True)) == pytest.approx(10.0)
    assert adjacent_surrogate(_rollout([1, 1, 1, 37], True)) > 4.0


def test_seed_rewards_speed_only_through_correctness() -> None:
    group = [_rollout([8], False), _rollout([4, 4], True), _rollout([1] * 8, True), _rollout([2] * 4, False)]
    credits = Seed(speed_weight=1.0).credit(group, progress=1.0)
    rewards = [credit.reward for credit in credits]
    assert rewards[0] == rewards[3] == 0.0
    assert rewards[1] > rewards[2] >= 1.0
    assert sum(credit.advantage for credit in credits) == pytest.approx(0.0)


def test_seed_speed_weight_ramps_up() -> None:
    group = [_rollout([4, 4], True), _rollout([1] * 8, True)]
    early, late = (Seed(ramp=0.2).credit(group, progress)[0].reward for progress in (0.0, 0.3))
    assert early == 1.0
    assert late == 2.0


def test_seed_leaves_out_groups_that_teach_nothing() -> None:
    assert {c.weight for c in Seed().credit([_rollout([4], False), _rollout([4], False)], 1.0)} == {0.0}


def _rows(advantage: list[float], old: list[float]) -> RowTensors:
    count = len(advantage)
    empty = torch.zeros(0, dtype=torch.int64)
    return RowTensors(
        tokens=empty, positions=empty, copies=empty, documents=empty, target_rows=empty, targets=torch.zeros(count, dtype=torch.int64),
        weights=torch.full((count,), 1.0 / count),
        extras={"advantage": torch.tensor(advantage), "old_logprob": torch.tensor(old)},
    )  # fmt: skip


def test_seed_gradient_follows_the_advantage_and_stops_at_the_clip() -> None:
    old = [-1.0, -1.0, -1.0, -1.0]
    logprob = torch.tensor([-1.0, -1.0, -0.5, -1.5], requires_grad=True)
    loss, metrics = Seed(clip=0.2).loss(logprob, torch.zeros(4), _rows([1.0, -1.0, 1.0, -1.0], old))
    loss.backward()
    assert logprob.grad is not None
    assert logprob.grad[0] < 0 < logprob.grad[1]
    assert logprob.grad[2] == logprob.grad[3] == 0.0
    assert float(metrics["clipped_sum"]) == 2.0


def test_distill_keeps_the_fastest_right_answer() -> None:
    group = [_rollout([8], False), _rollout([4, 4], True, 1), _rollout([1] * 8, True, 2)]
    assert [credit.weight for credit in Distill(keep=1).credit(group, 0.0)] == [0.0, 1.0, 0.0]
    assert [credit.weight for credit in Distill().credit([_rollout([8], False)], 0.0)] == [0.0]


def test_distill_certainty_term_adds_entropy() -> None:
    logprob, entropy = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 1.5])
    plain, _ = Distill(certainty=0.0).loss(logprob, entropy, _rows([0, 0], [0, 0]))
    forced, _ = Distill(certainty=2.0).loss(logprob, entropy, _rows([0, 0], [0, 0]))
    assert float(plain) == pytest.approx(1.5)
    assert float(forced) == pytest.approx(1.5 + 2.0)


def test_denoise_is_weighted_cross_entropy() -> None:
    loss, _ = Denoise().loss(torch.tensor([-1.0, -3.0]), torch.zeros(2), _rows([0, 0], [0, 0]))
    assert float(loss) == pytest.approx(2.0)
