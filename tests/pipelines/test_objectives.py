"""Objectives: what is credited, and which way the loss pushes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep.kernels.model.training import RowTensors
from fewstep.pipelines.objectives.coupled import Coupled
from fewstep.pipelines.objectives.credit import adjacent_surrogate, pairwise_surrogate
from fewstep.pipelines.objectives.denoise import Denoise
from fewstep.pipelines.objectives.distill import Distill
from fewstep.pipelines.objectives.policy_gradient import (
    KlForm,
    clipped_surrogate,
    kl_penalty,
    mismatch_weight,
)
from fewstep.pipelines.objectives.seed import Seed
from fewstep.pipelines.objectives.trajectory import Trace
from fewstep.pipelines.policy_update import per_target
from fewstep.platform.errors import ConfigError
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


def test_an_additive_reward_pays_wrong_answers_for_speed() -> None:
    """What the multiplicative gate prevents: the fast wrong answer is worth as much as the slow right one."""
    group = [_rollout([8], False), _rollout([1] * 8, True)]
    assert [c.reward for c in Seed(gating="additive").credit(group, 1.0)] == [1.0, 1.0]
    assert [c.reward for c in Seed().credit(group, 1.0)] == [0.0, 1.0]
    with pytest.raises(ConfigError, match="multiplicative or additive"):
        Seed(gating="none")  # type: ignore[arg-type]


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


def _scored(opened: list[int], score: float, sample: int = 0) -> Rollout:
    rollout = _rollout(opened, score == 1.0, sample)
    return replace(rollout, verdict=replace(rollout.verdict, score=score))


def _gradient(loss: torch.Tensor, logprob: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logprob)[0]


def test_kl_forms_are_the_estimators_of_their_definition() -> None:
    """Both are 0 with slope 0 at equality; k3 is unbiased: its mean over π_θ is the KL itself."""
    logits, other = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.5, -0.5])
    new, reference = torch.log_softmax(logits, 0), torch.log_softmax(other, 0)
    exact = (new.exp() * (new - reference)).sum()
    assert float((new.exp() * kl_penalty(new, reference, "k3")).sum()) == pytest.approx(
        float(exact), rel=1e-5
    )
    for form in ("k2", "k3"):
        same = reference.clone().requires_grad_()
        kl = kl_penalty(same, reference, form)
        assert kl.detach().abs().max() < 1e-6
        assert _gradient(kl.sum(), same).abs().max() < 1e-6
        away = (reference + 0.3).requires_grad_()
        assert (_gradient(kl_penalty(away, reference, form).sum(), away) > 0).all()
    assert kl_penalty(torch.tensor(-1.0), torch.tensor(-1.5), "k2") == pytest.approx(0.125)


def test_an_asymmetric_clip_lets_a_token_grow_further_than_it_may_shrink() -> None:
    ratio = torch.tensor([1.25, 1.35, 0.85, 0.75])
    log_ratio = ratio.log().requires_grad_()
    surrogate, outside = clipped_surrogate(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.3)
    assert outside.tolist() == [False, True, False, True]
    assert surrogate.tolist() == pytest.approx([1.25, 1.3, -0.85, -0.8])
    assert (_gradient(surrogate.sum(), log_ratio) != 0).tolist() == [True, False, True, False]


def test_mismatch_is_corrected_up_to_a_bound_and_never_differentiated() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    weight = mismatch_weight(old, torch.tensor([-1.0, -0.5, -4.0]), 2.0)
    assert weight.tolist() == pytest.approx([1.0, math.exp(-0.5), 2.0])
    assert not weight.requires_grad


def test_trace_z_scores_and_filters_groups() -> None:
    group = [_scored([4], 1.0), _scored([4], 0.5, 1), _scored([4], 0.0, 2), _scored([4], 0.5, 3)]
    credits = Trace(min_pass_rate=0.2, max_pass_rate=0.8).credit(group, 0.0)
    assert [credit.advantage for credit in credits] == pytest.approx([2**0.5, 0.0, -(2**0.5), 0.0])
    assert {credit.weight for credit in credits} == {1.0}
    for scores in ([1.0, 1.0, 1.0, 0.0], [0.0, 0.5, 0.0, 0.0], [1.0, 1.0], [0.0, 0.0]):
        rate = sum(score == 1.0 for score in scores) / len(scores)
        kept = Trace(min_pass_rate=0.2, max_pass_rate=0.7).credit([_scored([4], s) for s in scores], 0.0)
        assert {credit.weight for credit in kept} == {float(0.2 <= rate <= 0.7 and len(set(scores)) > 1)}


def test_trace_is_its_formula() -> None:
    """Σ w·ρ-clipped-A with the correction, plus β·k3, written out; value and gradient."""
    rows = _rows([1.0, -2.0, 0.5], [-1.0, -0.7, -2.0])
    extras = {
        **rows.extras,
        "rollout_logprob": torch.tensor([-1.1, -0.7, -3.5]),
        "reference_logprob": torch.tensor([-1.2, -0.5, -2.0]),
    }
    rows = replace(rows, extras=extras)
    logprob = torch.tensor([-0.9, -0.8, -1.2], requires_grad=True)
    objective = Trace(clip_low=0.2, clip_high=0.3, kl=0.1, mismatch_bound=2.0)
    assert objective.has_reference
    assert objective.corrects_mismatch
    loss, metrics = objective.loss(logprob, torch.zeros(3), rows)
    plain = torch.zeros(())
    for index in range(3):
        old, advantage = extras["old_logprob"][index], extras["advantage"][index]
        ratio = (logprob[index] - old).exp()
        clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
        correction = min(2.0, math.exp(float(old - extras["rollout_logprob"][index])))
        apart = extras["reference_logprob"][index] - logprob[index]
        plain = plain - correction * clipped / 3 + 0.1 * (apart.exp() - 1 - apart) / 3
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    torch.testing.assert_close(_gradient(loss, logprob), _gradient(plain, logprob))
    assert {"kl_sum", "correction_sum", "clipped_sum"} <= metrics.keys()


def _coupled_rows() -> tuple[RowTensors, torch.Tensor]:
    """Two samples of three tokens; everything masked, then a mask and its complement. Rows of a token lie apart."""
    positions = torch.tensor([[4, 5, 6, 5, 4, 6], [7, 8, 9, 7, 9, 8]])
    share = torch.tensor([0.5, 0.5, 0.5, 2.0, 0.6, 0.6, 0.5, 0.5, 0.5, 1.0, 1.0, 0.7])
    advantage = torch.tensor([1.0] * 6 + [-0.5] * 6)
    weights = torch.tensor(([0.1] * 3 + [0.0] * 3) * 2)
    rows = RowTensors(
        tokens=positions, positions=positions, copies=torch.zeros_like(positions), documents=torch.zeros_like(positions),
        target_rows=torch.arange(12), targets=torch.zeros(12, dtype=torch.int64), weights=weights,
        extras={
            "share": share, "advantage": advantage, "old_logprob": -torch.linspace(0.2, 1.3, 12),
            "reference_logprob": -torch.linspace(0.3, 1.0, 12),
        },
    )  # fmt: skip
    return rows, positions.flatten()


@pytest.mark.parametrize("form", ["k2", "k3"])
def test_coupled_is_its_formula_token_by_token(form: KlForm) -> None:
    rows, positions = _coupled_rows()
    logprob = (rows.extras["old_logprob"] + torch.linspace(-0.3, 0.3, 12)).requires_grad_()
    loss, metrics = Coupled(clip_low=0.2, clip_high=0.4, kl=0.05, kl_form=form).loss(
        logprob, torch.zeros(12), rows
    )
    plain, kls, num_clipped = torch.zeros(()), [], 0
    for sample, position in ((s, p) for s in (0, 1) for p in positions[6 * s : 6 * s + 6].unique().tolist()):
        own = [row for row in range(6 * sample, 6 * sample + 6) if positions[row] == position]

        def of(values: torch.Tensor, own: list[int] = own) -> torch.Tensor:
            return torch.stack([rows.extras["share"][row] * values[row] for row in own]).sum()

        new, old, reference = (
            of(v) for v in (logprob, rows.extras["old_logprob"], rows.extras["reference_logprob"])
        )
        ratio, advantage = (new - old).exp(), rows.extras["advantage"][own[0]]
        clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.4) * advantage)
        apart = reference - new
        kl = apart.square() / 2 if form == "k2" else apart.exp() - 1 - apart
        plain = plain - 0.1 * clipped + 0.05 * 0.1 * kl
        kls.append(float(kl.detach()))
        num_clipped += not 0.8 <= float(ratio.detach()) <= 1.4
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    torch.testing.assert_close(_gradient(loss, logprob), _gradient(plain, logprob))
    # The trainer counts rows; a mean over them is one over tokens.
    means = per_target({name: float(value) for name, value in metrics.items()} | {"targets": 12.0})
    assert means["kl"] == pytest.approx(sum(kls) / 6, rel=1e-5)
    assert means["clipped"] == pytest.approx(num_clipped / 6)
    assert num_clipped


def test_a_reference_is_asked_for_only_where_it_counts() -> None:
    for kind in (Trace, Coupled, Seed):
        assert kind(kl=0.1).has_reference
        assert not kind(kl=0.0).has_reference
    with pytest.raises(ConfigError, match="k2 or k3"):
        Trace(kl_form="k1")  # type: ignore[arg-type]
