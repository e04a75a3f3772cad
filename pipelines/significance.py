"""What a handful of tasks can say about a model, and what it cannot.

The task is the unit everywhere: samples of one task share its difficulty, so resampling answers instead of tasks would
make intervals too narrow. Random numbers are keyed: the same answers give the same interval on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.platform.rng import generator

Values = NDArray[np.float64]

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
_ROWS_AT_ONCE = 1 << 22  # draws of a resampling step; 32 MiB of indices


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds at `CONFIDENCE`."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        """`0.412 (0.338 to 0.488)`."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Chance that one of k answers passes, estimated without bias from n answers of which c passed.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, 2107.03374, equation 1), as a product that cannot overflow.

    Raises:
        ValueError: k < 1, k > n, or c outside 0..n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise ValueError(f"pass@{k} of {num_passed} passed among {num_samples}")
    if num_samples - num_passed < k:
        return 1.0
    factors = [1.0 - k / i for i in range(num_samples - num_passed + 1, num_samples + 1)]
    return 1.0 - math.prod(factors)


def mean_interval(values: Sequence[float], *key: int | str) -> Interval:
    """Mean over tasks with a percentile bootstrap interval.

    Where all tasks have the same value the bootstrap would claim certainty; for shares the exact binomial bound stands in
    for it (of T tasks all passed: the true rate is at least (alpha/2)^(1/T)).

    Args:
        values: one number a task, at least one task.
        key: of the random numbers.
    """
    data = np.asarray(values, np.float64)
    mean = float(data.mean())
    if np.all(data == data[0]):
        slack = 1.0 - ((1.0 - CONFIDENCE) / 2.0) ** (1.0 / len(data))
        low = 1.0 - slack if data[0] == 1.0 else mean
        return Interval(mean, low, slack if data[0] == 0.0 else mean)
    return Interval(mean, *_bounds(_resampled(data[:, None], "mean", *key)[:, 0]))


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float], *key: int | str) -> Interval:
    """Ratio of two sums over the same tasks (tokens per forward, or how many times fewer forwards), resampled together."""
    pairs = np.column_stack([np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)])
    resampled = _resampled(pairs, "ratio", *key)
    total = pairs.sum(axis=0)
    return Interval(float(total[0] / total[1]), *_bounds(resampled[:, 0] / resampled[:, 1]))


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same tasks.

    Attributes:
        difference: mean of second minus first over tasks, with a paired bootstrap interval.
        p_value: two-sided; `adjusted` after Holm's correction for the other comparisons of the report.
        test: its name.
        better, worse: tasks on which the second does better, and worse.
    """

    difference: Interval
    p_value: float
    adjusted: float
    test: str
    better: int
    worse: int
    num_tasks: int

    @property
    def significant(self) -> bool:
        """Whether the difference is more than the tasks' noise at `CONFIDENCE`."""
        return self.adjusted < 1.0 - CONFIDENCE

    def verdict(self) -> str:
        """One sentence; says so where nothing can be claimed."""
        points = Interval(
            *(100.0 * bound for bound in (self.difference.value, self.difference.low, self.difference.high))
        )
        numbers = f"{points.text(1)} points, p = {self.adjusted:.2g}, {self.better} tasks better, {self.worse} worse"
        if not self.significant:
            return f"not significant: {numbers}"
        return f"{'better' if self.difference.value > 0 else 'worse'}: {numbers}"

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "significant": self.significant, "verdict": self.verdict()}


def paired_test(first: Sequence[float], second: Sequence[float], *key: int | str) -> PairedTest:
    """Whether the second model does better on the tasks that both were given.

    One answer a task: McNemar's test in its exact form, binomial over the tasks on which the two differ. Several
    answers a task: a sign-flip permutation test of the per-task differences, exact up to 16 differing tasks.

    Args:
        first, second: one number a task, in the same order.
        key: of the random numbers.
    """
    before, after = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if before.shape != after.shape or not len(before):
        raise ValueError(f"{len(before)} and {len(after)} tasks cannot be paired")
    difference = after - before
    differing = difference[difference != 0.0]
    interval = Interval(
        float(difference.mean()), *_bounds(_resampled(difference[:, None], "paired", *key)[:, 0])
    )
    if np.all(np.isin(np.concatenate([before, after]), (0.0, 1.0))):
        name, p_value = "McNemar, exact", _binomial(int((differing > 0).sum()), len(differing))
    else:
        name, p_value = _sign_flip(differing, *key)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return PairedTest(interval, p_value, p_value, name, better, worse, len(difference))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: the smallest times m, the next times m - 1, never falling."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _resampled(columns: Values, *key: int | str) -> Values:
    """[NUM_RESAMPLES, columns] means over tasks drawn with replacement; columns of one task stay together."""
    draws = generator("bootstrap", *key)
    num_tasks = len(columns)
    step = max(1, _ROWS_AT_ONCE // num_tasks)
    parts = []
    for start in range(0, NUM_RESAMPLES, step):
        rows = min(step, NUM_RESAMPLES - start)
        parts.append(columns[draws.integers(0, num_tasks, (rows, num_tasks))].mean(axis=1))
    return np.concatenate(parts)


def _bounds(resampled: Values) -> tuple[float, float]:
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(resampled, (tail, 1.0 - tail))
    return float(low), float(high)


def _binomial(successes: int, trials: int) -> float:
    """Two-sided exact p-value of a fair coin."""
    if trials == 0:
        return 1.0
    extreme = min(successes, trials - successes)
    tail = sum(math.comb(trials, i) for i in range(extreme + 1))
    return min(1.0, float(2 * tail / 2**trials))  # integers of any size: exact


def _sign_flip(differing: Values, *key: int | str) -> tuple[str, float]:
    if not len(differing):
        return "sign flips, exact", 1.0
    observed = abs(float(differing.sum())) - 1e-12
    if len(differing) <= 16:
        bits = (np.arange(2 ** len(differing))[:, None] >> np.arange(len(differing))) & 1
        return "sign flips, exact", float(np.mean(np.abs((2 * bits - 1) @ differing) >= observed))
    draws = generator("sign-flip", *key)
    signs = 2 * draws.integers(0, 2, (NUM_RESAMPLES, len(differing))) - 1
    extreme = int((np.abs(signs @ differing) >= observed).sum())
    return "sign flips, sampled", (extreme + 1) / (NUM_RESAMPLES + 1)
