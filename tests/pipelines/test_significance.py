"""Statistics that are right: against brute force, against known values, and against coverage by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.pipelines.significance import (
    CONFIDENCE,
    holm,
    mean_interval,
    paired_test,
    pass_at_k,
    ratio_interval,
)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(num_samples: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    answers = [True] * passed + [False] * (num_samples - passed)
    subsets = list(itertools.combinations(answers, k))
    assert pass_at_k(num_samples, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_samples_is_exact() -> None:
    exact = 1 - math.comb(199, 100) / math.comb(200, 100)
    assert pass_at_k(200, 1, 100) == pytest.approx(exact, abs=1e-12)
    # The mean of c/n raised to k is the biased estimate this one replaces.
    assert pass_at_k(10, 5, 5) > 1 - (1 - 0.5) ** 5


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_of_nonsense_is_an_error(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_intervals_cover_as_often_as_they_say() -> None:
    draws = np.random.Generator(np.random.Philox(5))
    covered = 0
    for trial in range(300):
        sample = (draws.random(80) < 0.3).astype(float)
        interval = mean_interval(sample.tolist(), "coverage", trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 300 <= 0.985


def test_an_interval_is_the_same_everywhere_and_keyed() -> None:
    values = np.random.Generator(np.random.Philox(3)).random(40).tolist()
    assert mean_interval(values, "a") == mean_interval(values, "a")
    assert mean_interval(values, "a") != mean_interval(values, "b")


def test_all_right_is_no_certainty() -> None:
    everything = mean_interval([1.0] * 20, "x")
    assert everything.value == everything.high == 1.0
    assert everything.low == pytest.approx(0.025 ** (1 / 20))
    nothing = mean_interval([0.0] * 20, "x")
    assert (nothing.low, nothing.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))


def test_tasks_are_resampled_not_answers() -> None:
    # Eight tasks, each solved always or never: a hundred answers of each add nothing.
    narrow = mean_interval([1.0, 0.0] * 400, "tasks")
    wide = mean_interval([1.0, 0.0] * 4, "tasks")
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_a_ratio_is_of_sums_over_the_same_tasks() -> None:
    forwards, fewer = [10.0, 20.0, 30.0, 40.0], [5.0, 10.0, 15.0, 20.0]
    ratio = ratio_interval(forwards, fewer, "ratio")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_mcnemar_is_the_binomial_of_the_tasks_that_differ() -> None:
    # 9 better, 1 worse of 40: 2 * (1 + 10) / 2^10.
    first = [0.0] * 9 + [1.0] + [1.0] * 15 + [0.0] * 15
    second = [1.0] * 9 + [0.0] + [1.0] * 15 + [0.0] * 15
    found = paired_test(first, second, "x")
    assert found.p_value == pytest.approx(22 / 1024)
    assert (found.better, found.worse, found.num_tasks) == (9, 1, 40)
    assert found.difference.value == pytest.approx(0.2)
    assert found.test == "McNemar, exact"
    assert found.significant
    assert found.verdict().startswith("better: 20.0 (")


def test_noise_is_called_noise() -> None:
    found = paired_test([1.0, 0.0, 1.0, 0.0] * 10, [1.0, 0.0, 0.0, 1.0] * 10, "x")
    assert found.p_value == 1.0
    assert not found.significant
    assert found.verdict().startswith("not significant: 0.0 (")
    same = paired_test([1.0, 0.0], [1.0, 0.0], "x")
    assert (same.p_value, same.significant) == (1.0, False)


def test_pairs_see_what_two_averages_cannot() -> None:
    # Half the tasks are hopeless for both; the second model never loses one that the first solved.
    first = [1.0] * 40 + [0.0] * 12 + [0.0] * 48
    second = [1.0] * 40 + [1.0] * 12 + [0.0] * 48
    found = paired_test(first, second, "x")
    assert found.significant
    alone = mean_interval(first, "a"), mean_interval(second, "b")
    assert alone[0].high > alone[1].low  # the averages' own intervals overlap


def test_several_answers_a_task_are_tested_by_sign_flips() -> None:
    first, second = [0.5, 0.25, 0.5, 0.75], [0.75, 0.5, 0.75, 1.0]
    found = paired_test(first, second, "x")
    assert found.test == "sign flips, exact"
    assert found.p_value == pytest.approx(2 / 16)  # all four up or all four down
    draws = np.random.Generator(np.random.Philox(1))
    base = draws.random(60)
    sampled = paired_test(base.tolist(), (base + 0.1).tolist(), "x")
    assert (sampled.test, sampled.significant) == ("sign flips, sampled", True)
    assert paired_test(base.tolist(), draws.permuted(base).tolist(), "x").significant is False


def test_false_alarms_are_as_rare_as_they_should_be() -> None:
    draws = np.random.Generator(np.random.Philox(9))
    alarms = 0
    for trial in range(300):
        both = (draws.random((2, 60)) < 0.5).astype(float)
        alarms += paired_test(*both.tolist(), "alarm", trial).significant
    assert alarms / 300 <= 1 - CONFIDENCE + 0.025


def test_tasks_that_do_not_pair_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 and 1 tasks"):
        paired_test([1.0, 0.0], [1.0], "x")


def test_holm_corrects_for_looking_often() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    # Twelve looks at nothing: the smallest of twelve uniform p-values is often below 0.05, the corrected one rarely.
    draws = np.random.Generator(np.random.Philox(2)).random((400, 12))
    assert (draws.min(1) < 0.05).mean() > 0.3
    assert np.mean([min(holm(row.tolist())) < 0.05 for row in draws]) < 0.08
