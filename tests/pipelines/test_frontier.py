"""The frontier: sums over answers, the bar, the two speedups, AUP by hand, and the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.pipelines.frontier import (
    SEQUENTIAL,
    accuracy_under_parallelism,
    cheapest_within,
    compare,
    is_sequential,
    measure,
    point_record,
    refuse_broken,
    sequential_point,
    summarise,
)
from fewstep.pipelines.frontier_table import comparison_table, frontier_table
from fewstep.pipelines.task_source import prepared_plainly
from fewstep.pipelines.tasks.family import tasks
from fewstep.pipelines.tasks.vocabulary import EOS, MASK, PAD, build_tokenizer
from fewstep.platform.errors import FewstepError
from fewstep.platform.records import (
    DecodePolicy,
    FrontierPoint,
    Outcome,
    Rollout,
    Task,
    Trajectory,
    Verdict,
    WeightVersion,
)  # fmt: skip

THRESHOLD = {value: DecodePolicy(threshold=value) for value in (0.9, 0.5, 0.1)}


def point(
    policy: DecodePolicy, pass_at_1: float, forwards: float, tpf: float = 1.0, num_tasks: int = 500
) -> FrontierPoint:
    return FrontierPoint(policy, pass_at_1, forwards, tpf, 10.0, num_tasks, {})


def trajectory(num_tokens: int, forwards: int) -> Trajectory:
    canvas = np.zeros(num_tokens, np.int32)
    scores = np.zeros(num_tokens, np.float32)
    return Trajectory(
        canvas, canvas, canvas.astype(np.int16), scores, scores, num_tokens, forwards, "stop", SEQUENTIAL, 0, "", ""
    )  # fmt: skip


def verdict(outcome: Outcome) -> Verdict:
    return Verdict(outcome, float(outcome == "passed"), (), 0.0, "none")


BEFORE = [point(SEQUENTIAL, 0.95, 40.0), point(THRESHOLD[0.9], 0.94, 12.0), point(THRESHOLD[0.5], 0.70, 6.0)]
AFTER = [point(SEQUENTIAL, 0.95, 41.0), point(THRESHOLD[0.9], 0.96, 5.0), point(THRESHOLD[0.5], 0.94, 4.0)]


def test_a_point_adds_up_answers() -> None:
    answers = [trajectory(10, 5), trajectory(30, 15), trajectory(20, 20)]
    verdicts = [verdict("passed"), verdict("timeout"), verdict("passed")]
    found = summarise(THRESHOLD[0.9], answers, verdicts, seconds=4.0)
    assert found.pass_at_1 == pytest.approx(2 / 3)
    assert found.forwards_per_answer == pytest.approx(40 / 3)
    assert found.tokens_per_forward == pytest.approx(60 / 40)
    assert found.tokens_per_second == pytest.approx(60 / 4)
    assert (found.num_tasks, found.outcomes) == (3, {"passed": 2, "timeout": 1})


def test_the_cheapest_point_must_reach_the_bar() -> None:
    assert cheapest_within(BEFORE, 0.94) is BEFORE[1]
    assert cheapest_within(BEFORE, 0.70) is BEFORE[2]
    assert cheapest_within(BEFORE, 0.96) is None
    # One hundredth below is on the bar, whatever binary fractions make of it.
    assert cheapest_within(BEFORE, 0.95 - 0.01) is BEFORE[1]
    better = point(THRESHOLD[0.1], 0.99, 6.0)
    assert cheapest_within([*BEFORE, better], 0.5) is better


def test_both_models_are_held_to_the_unrefined_bar() -> None:
    speedup = compare(BEFORE, AFTER)
    assert speedup.bar == pytest.approx(0.94)
    assert (speedup.before, speedup.after) == (BEFORE[1], AFTER[2])
    assert speedup.speedup_forwards == pytest.approx(12.0 / 4.0)
    # Against the unrefined model's 40 forwards, not the refined one's 41.
    assert speedup.speedup_vs_sequential == pytest.approx(40.0 / 4.0)
    assert "3.00x fewer forwards, 10.00x" in speedup.text()


def test_a_refined_model_below_the_bar_has_no_speedup() -> None:
    speedup = compare(BEFORE, [point(SEQUENTIAL, 0.939, 40.0), point(THRESHOLD[0.5], 0.93, 2.0)])
    assert (speedup.after, speedup.speedup_forwards, speedup.speedup_vs_sequential) == (None, None, None)
    assert "No policy of the refined model reaches the bar of 0.940" in speedup.text()


def test_frontiers_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="different numbers of tasks"):
        compare(BEFORE, [point(SEQUENTIAL, 0.95, 40.0, num_tasks=499)])
    with pytest.raises(ValueError, match="no point at one token per step"):
        compare(BEFORE[1:], AFTER)


def test_the_reference_is_greedy_and_unlimited() -> None:
    static = {"kind": "static", "tokens_per_step": 1}
    assert is_sequential(DecodePolicy(**static, seed=7))
    for change in (
        {"max_steps_per_block": 1},
        {"temperature": 1.0},
        {"tokens_per_step": 2},
        {"kind": "threshold"},
    ):
        assert not is_sequential(DecodePolicy(**{**static, **change}))


def test_aup_by_hand() -> None:
    static_4 = DecodePolicy(kind="static", tokens_per_step=4)
    curve = [
        point(static_4, 0.60, 1.0, tpf=8.0),  # more than 5 points below the first: left out
        point(THRESHOLD[0.5], 0.76, 1.0, tpf=4.0),
        point(SEQUENTIAL, 0.80, 1.0, tpf=1.0),
        point(THRESHOLD[0.9], 0.80, 1.0, tpf=2.0),
    ]
    # W(80) = 1 and W(76) = exp(-3 * 4 / 80) = 0.860708, so 80 + (80 + 80) / 2 + 2 * (80 + 65.413806) / 2.
    assert accuracy_under_parallelism(curve) == pytest.approx(305.413806, abs=1e-5)
    # Against a rival at 100 %: W(80) = exp(-0.6) = 0.548812, W(76) = exp(-0.72) = 0.486752;
    # 80 + 43.904931 + (43.904931 + 36.993172).
    assert accuracy_under_parallelism(curve, best=100.0) == pytest.approx(204.803034, abs=1e-4)
    assert accuracy_under_parallelism([point(SEQUENTIAL, 0.8, 40.0)]) == pytest.approx(80.0)


def test_a_record_names_the_policy_and_the_error_bar() -> None:
    record = point_record(point(THRESHOLD[0.9], 0.9, 12.0, num_tasks=900))
    assert record["label"] == "threshold_0.9"
    assert record["policy"]["threshold"] == 0.9
    assert record["pass_at_1_standard_error"] == pytest.approx(0.01)


def test_tables_mark_what_is_compared() -> None:
    after = [*AFTER, point(THRESHOLD[0.1], 0.5, 2.0)]
    plain = comparison_table(BEFORE, after, compare(BEFORE, after)).splitlines()
    assert max(len(line) for line in plain[:7]) <= 100
    marked = {line.split()[0]: line.count("*") for line in plain[3:7]}
    assert marked == {"static_1": 0, "threshold_0.9": 1, "threshold_0.5": 1, "threshold_0.1": 0}
    assert plain[6].split()[1:5] == ["-"] * 4  # not measured before
    ends = [line.index("12.00") + 5 if "12.00" in line else line.index("40.00") + 5 for line in plain[3:5]]
    assert ends[0] == ends[1]

    table = comparison_table(BEFORE, after, compare(BEFORE, after), "markdown").splitlines()
    assert len({line.count("|") for line in table[:6]}) == 1
    assert "| 12.00 * |" in table[3]
    assert "|---|---:|" in frontier_table(BEFORE, 0.94, "markdown")
    assert frontier_table(BEFORE, 0.94).count(" *\n") + frontier_table(BEFORE, 0.94).count("12.00 *") == 1


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    mask, eos, pad = (tokenizer.token_to_id(token) for token in (MASK, EOS, PAD))
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, intermediate_size=16, max_position_embeddings=128, block_size=8,
        mask_token_id=mask, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    model = Transformer(config)
    model.initialise(0)
    return Engine(model, tokenizer, weight_version=WeightVersion("test", 0, "0"))


def test_measuring_a_real_engine(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    asked = tasks(6, seed=0, held_out=True)
    seen: list[tuple[FrontierPoint, list[Rollout]]] = []
    requests: list[Sequence[Request]] = []

    def generate(batch: Sequence[Request]) -> list[Trajectory]:
        requests.append(batch)
        return engine.generate(batch)

    def verify(pairs: Sequence[tuple[Task, str]]) -> list[Verdict]:
        # Even tasks pass: the order of verdicts must be the order of tasks.
        return [verdict("passed" if asked.index(task) % 2 == 0 else "wrong_answer") for task, _ in pairs]

    sampled = DecodePolicy(threshold=0.5, temperature=1.0, seed=3)
    points = measure(
        prepared_plainly(asked, engine.tokenizer, 24), [sampled, SEQUENTIAL, DecodePolicy(kind="static", tokens_per_step=8)], generate, verify,
        engine.tokenizer, observe=lambda *found: seen.append(found),
    )  # fmt: skip
    assert [found.policy.label() for found in points] == ["static_1", "threshold_0.5", "static_8"]
    assert [found for found, _ in seen] == points
    assert sequential_point(points) is points[0]
    # One whole block at a time is the cheapest there is; one token at a time never beats one token per forward.
    assert points[2].forwards_per_answer < points[0].forwards_per_answer
    assert points[0].tokens_per_forward <= 1.0
    assert len({request.policy.seed for request in requests[1]}) == len(asked)
    rollouts = seen[0][1]
    assert [rollout.task_id for rollout in rollouts] == [task.task_id for task in asked]
    assert [rollout.verdict.passed for rollout in rollouts] == [True, False] * 3
    assert points[0].forwards_per_answer == pytest.approx(np.mean([r.trajectory.forwards for r in rollouts]))
    assert all(rollout.text == engine.text_of(rollout.trajectory) for rollout in rollouts)
    assert capsys.readouterr().out.count("pass@1 0.500") == len(points)


def test_a_task_twice_is_refused(engine: Engine) -> None:
    task = tasks(1, seed=0, held_out=True)[0]
    with pytest.raises(ValueError, match="no task twice"):
        measure(
            prepared_plainly([task, task], engine.tokenizer, 8),
            [],
            engine.generate,
            lambda pairs: [],
            engine.tokenizer,
        )


def test_a_broken_verifier_is_no_lost_quality(engine: Engine) -> None:
    asked = prepared_plainly(tasks(4, seed=0, held_out=True), engine.tokenizer, 8)
    broken = Verdict("sandbox_error", 0.0, (), 0.0, "none", "no zygote")

    def verify(pairs: Sequence[tuple[Task, str]]) -> list[Verdict]:
        return [broken, *(verdict("passed") for _ in pairs[1:])]

    with pytest.raises(
        FewstepError, match="static_1: the verifier itself failed on 1 of 4 answers: no zygote"
    ):
        measure(asked, [], engine.generate, verify, engine.tokenizer)
    judged = [verdict("passed")] * 19 + [broken]
    refuse_broken(judged, "a twentieth")
    refuse_broken(judged[-2:], "few", forgiven=1)
    with pytest.raises(FewstepError, match="failed on 1 of 19"):
        refuse_broken(judged[1:], "more")


def test_error_bars_shrink_with_the_square_root_of_the_tasks() -> None:
    record = point_record(point(SEQUENTIAL, 0.5, 1.0, num_tasks=100))
    assert record["pass_at_1_standard_error"] == pytest.approx(math.sqrt(0.25 / 100))
