"""From judged answers to numbers with their error bars: per policy, per frontier, and between two models."""

from __future__ import annotations

import statistics as spread
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fewstep.pipelines.evaluation import Answer, Measured
from fewstep.pipelines.frontier import accuracy_under_parallelism, cheapest_within, quality_bar
from fewstep.pipelines.significance import (
    Interval,
    PairedTest,
    holm,
    mean_interval,
    paired_test,
    pass_at_k,
    ratio_interval,
)
from fewstep.pipelines.tasks.benchmark import Benchmark
from fewstep.platform.records import DecodePolicy, FrontierPoint


@dataclass(frozen=True)
class PolicySummary:
    """One policy on one benchmark.

    Attributes:
        point: what tables and figures of frontiers take.
        passes: pass@k by k, over tasks.
        first_test: pass@1 of a verdict's first test alone (EvalPlus: the base score); None where there is one test.
        per_seed: pass@1 of each seed.
        dominated: another policy is at least as good and as cheap, and better in one.
    """

    point: FrontierPoint
    passes: dict[int, Interval]
    forwards: Interval
    tokens_per_forward: Interval
    first_test: Interval | None
    per_seed: dict[int, float]
    by_language: dict[str, float]
    mean_tokens: float
    dominated: bool = False

    def record(self) -> dict[str, Any]:
        """As JSON."""
        spread_over_seeds = spread.stdev(self.per_seed.values()) if len(self.per_seed) > 1 else None
        return {
            "label": self.point.policy.label(),
            **asdict(self.point),
            "policy": self.point.policy.model_dump(mode="json"),
            "pass_at_k": {str(k): asdict(interval) for k, interval in self.passes.items()},
            "forwards_interval": asdict(self.forwards),
            "tokens_per_forward_interval": asdict(self.tokens_per_forward),
            "first_test": None if self.first_test is None else asdict(self.first_test),
            "pass_at_1_per_seed": {str(seed): value for seed, value in self.per_seed.items()},
            "pass_at_1_spread_over_seeds": spread_over_seeds,
            "pass_at_1_by_language": self.by_language,
            "mean_tokens": self.mean_tokens,
            "dominated": self.dominated,
        }


@dataclass(frozen=True)
class FrontierSummary:
    """A model on one benchmark.

    Attributes:
        bar: pass@1 of the first policy (one token per step), less `TOLERANCE`.
        cheapest: the policy with the fewest forwards that reaches it.
        aup: accuracy under parallelism (d3LLM), in percent.
    """

    policies: tuple[PolicySummary, ...]
    bar: float
    cheapest: PolicySummary
    speedup: float
    aup: float

    @property
    def points(self) -> list[FrontierPoint]:
        """The points, in order."""
        return [summary.point for summary in self.policies]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "points": [summary.record() for summary in self.policies],
            "bar": self.bar,
            "cheapest": self.cheapest.point.policy.label(),
            "speedup_vs_sequential": self.speedup,
            "accuracy_under_parallelism": self.aup,
        }


def summarise_policy(measured: Measured, benchmark: Benchmark, ks: Sequence[int]) -> PolicySummary:
    """Numbers of one policy.

    Args:
        ks: the k of pass@k; pass@1 is always there.
    """
    tasks = list(by_task(measured.answers).values())
    key, name = benchmark.name, measured.policy.label()
    passes = {
        k: mean_interval([_pass(group, k) for group in tasks], key, name, f"pass@{k}")
        for k in sorted({1, *ks})
    }
    forwards = [_mean([answer.forwards for answer in group]) for group in tasks]
    tokens = [_mean([answer.num_tokens for answer in group]) for group in tasks]
    per_forward = ratio_interval(tokens, forwards, key, name, "tpf")
    point = FrontierPoint(
        policy=measured.policy,
        pass_at_1=passes[1].value,
        forwards_per_answer=_mean(forwards),
        tokens_per_forward=per_forward.value,
        tokens_per_second=sum(answer.num_tokens for answer in measured.answers) / max(measured.seconds, 1e-9),
        num_tasks=len(tasks),
        outcomes=dict(Counter(answer.outcome for answer in measured.answers).most_common()),
    )
    return PolicySummary(
        point=point,
        passes=passes,
        forwards=mean_interval(forwards, key, name, "forwards"),
        tokens_per_forward=per_forward,
        first_test=_first_test(tasks, key, name) if benchmark.first_test else None,
        per_seed=_grouped_mean(measured.answers, lambda answer: answer.seed),
        by_language=_grouped_mean(measured.answers, lambda answer: answer.language),
        mean_tokens=_mean(tokens),
    )


def summarise_frontier(
    measured: Sequence[Measured], benchmark: Benchmark, ks: Sequence[int]
) -> FrontierSummary:
    """A model's frontier; the first policy is the reference that the others are held against."""
    summaries = [summarise_policy(one, benchmark, ks) for one in measured]
    points = [summary.point for summary in summaries]
    summaries = [replace(summary, dominated=_dominated(summary.point, points)) for summary in summaries]
    bar = quality_bar(points[0])
    chosen = cheapest_within(points, bar) or points[0]
    cheapest = next(summary for summary in summaries if summary.point is chosen)
    return FrontierSummary(
        policies=tuple(summaries),
        bar=bar,
        cheapest=cheapest,
        speedup=points[0].forwards_per_answer / chosen.forwards_per_answer,
        aup=accuracy_under_parallelism(points),
    )


def _dominated(point: FrontierPoint, points: Sequence[FrontierPoint]) -> bool:
    return any(
        other.pass_at_1 >= point.pass_at_1
        and other.forwards_per_answer <= point.forwards_per_answer
        and (other.pass_at_1, other.forwards_per_answer) != (point.pass_at_1, point.forwards_per_answer)
        for other in points
    )


@dataclass(frozen=True)
class PolicyComparison:
    """Two models at one pair of policies: quality tested in pairs, cost as a ratio with its interval.

    Attributes:
        name: of the pair, for reports: the policy's label, or `cheapest at the bar`.
        fewer_forwards: forwards of the first model over those of the second, on the same tasks.
    """

    name: str
    first: DecodePolicy
    second: DecodePolicy
    quality: PairedTest
    fewer_forwards: Interval

    @property
    def cost_differs(self) -> bool:
        """Whether 1 lies outside the interval of the ratio."""
        return not self.fewer_forwards.low <= 1.0 <= self.fewer_forwards.high

    def text(self) -> str:
        """One line."""
        ratio, word = self.fewer_forwards, "fewer"
        if ratio.value < 1.0:
            ratio, word = Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low), "more"
        cost = f"{ratio.text(2)}x {word} forwards"
        return f"{self.name}: {self.quality.verdict()}; {cost if self.cost_differs else cost + ', not significant'}"

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name,
            "first": self.first.label(),
            "second": self.second.label(),
            "quality": self.quality.record(),
            "fewer_forwards": asdict(self.fewer_forwards),
            "text": self.text(),
        }


def compare_models(
    first: Sequence[Measured], second: Sequence[Measured], summaries: Sequence[FrontierSummary], key: str
) -> list[PolicyComparison]:
    """Every policy against itself, then each model at its own cheapest policy that holds the first model's bar.

    The p-values are Holm's over all of them: of twelve comparisons one is below 0.05 by luck alone.
    """
    pairs = [(one.policy.label(), one, other) for one, other in zip(first, second, strict=True)]
    bar = summaries[0].bar
    best = [cheapest_within(summary.points, bar) for summary in summaries]
    if best[0] is not None and best[1] is not None:
        pairs.append(("cheapest at the bar", _of_policy(first, best[0]), _of_policy(second, best[1])))
    tests = [paired_test(*_paired(one, other, _passed), key, name) for name, one, other in pairs]
    adjusted = holm([test.p_value for test in tests])
    return [
        PolicyComparison(
            name=name,
            first=one.policy,
            second=other.policy,
            quality=replace(test, adjusted=p_value),
            fewer_forwards=ratio_interval(*_paired(one, other, _forwards), key, name, "forwards"),
        )
        for (name, one, other), test, p_value in zip(pairs, tests, adjusted, strict=True)
    ]


def _of_policy(measured: Sequence[Measured], point: FrontierPoint) -> Measured:
    return next(one for one in measured if one.policy == point.policy)


def _paired(one: Measured, other: Measured, of: Callable[[Answer], float]) -> tuple[list[float], list[float]]:
    """A number a task of both, in one order."""
    groups, others = by_task(one.answers), by_task(other.answers)
    if groups.keys() != others.keys():
        raise ValueError("the two models were not given the same tasks")
    return (
        [_mean([of(answer) for answer in groups[task]]) for task in groups],
        [_mean([of(answer) for answer in others[task]]) for task in groups],
    )


def _passed(answer: Answer) -> float:
    return float(answer.passed)


def _forwards(answer: Answer) -> float:
    return float(answer.forwards)


def by_task(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers by task, tasks in the order they were measured."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.task_id, []).append(answer)
    return groups


def _pass(group: Sequence[Answer], k: int) -> float:
    return pass_at_k(len(group), sum(answer.passed for answer in group), k)


def _first_test(tasks: Sequence[Sequence[Answer]], *key: str) -> Interval:
    shares = [_mean([float(bool(answer.tests and answer.tests[0])) for answer in group]) for group in tasks]
    return mean_interval(shares, *key, "first test")


def _grouped_mean(answers: Sequence[Answer], key: Callable[[Answer], Any]) -> dict[Any, float]:
    """Share of passed answers by a key, in the key's order; tasks have equally many answers, so no task weighs more."""
    groups: dict[Any, list[bool]] = {}
    for answer in answers:
        groups.setdefault(key(answer), []).append(answer.passed)
    return {name: sum(passed) / len(passed) for name, passed in sorted(groups.items())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
