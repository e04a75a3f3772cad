"""An evaluation in MLflow: parameters, the data it was measured on, the metrics of every policy, the report's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fewstep.pipelines.evaluation import Contender
from fewstep.pipelines.evaluation_settings import EvaluateConfig
from fewstep.pipelines.evaluation_summary import FrontierSummary, PolicyComparison
from fewstep.pipelines.repair import RepairSummary
from fewstep.pipelines.tasks.benchmark import Benchmark
from fewstep.pipelines.tracked_run import RunPlan, tracked_run
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.tracking import Tracker

REPORT_FILES = ("report.json", "report.md", "answers.parquet")


@contextmanager
def open_tracker(
    config: EvaluateConfig, contenders: Sequence[Contender], benchmarks: Sequence[Benchmark], *, resumed: bool
) -> Iterator[MlflowTracker]:
    """The evaluation's run, with what it is about: which models, as they were when it started, on which data. One that was
    interrupted is gone on with."""
    tags = {
        f"fewstep.evaluated.{contender.slot}.{key}": value
        for contender in contenders
        for key, value in contender.identity.items()
    }
    plan = RunPlan(
        kind="evaluate", config=config, out=config.out, tracking_uri=config.tracking_uri, experiment=config.experiment,
        description="Quality and speed over decode policies: " + ", ".join(one.name for one in benchmarks),
        resumed=resumed, required=True, tags=tags,
    )  # fmt: skip
    with tracked_run(plan) as tracker:
        for benchmark in benchmarks:
            tracker.log_dataset(
                benchmark.name,
                digest=benchmark.digest,
                context="evaluation",
                source=benchmark.source,
                profile={"num_tasks": len(benchmark.tasks), "num_excluded": len(benchmark.excluded)},
            )
        yield tracker


def log_frontier(tracker: Tracker, benchmark: str, slot: str, frontier: FrontierSummary) -> None:
    """`eval/BENCHMARK/POLICY/...`; with two models the slot stands between."""
    prefix = f"eval/{benchmark}" if slot == "model" else f"eval/{benchmark}/{slot}"
    metrics = {f"{prefix}/aup": frontier.aup, f"{prefix}/speedup_vs_sequential": frontier.speedup}
    for one in frontier.policies:
        group = f"{prefix}/{one.point.policy.label()}"
        metrics |= {f"{group}/pass@{k}": interval.value for k, interval in one.passes.items()}
        metrics |= {f"{group}/pass@1_low": one.passes[1].low, f"{group}/pass@1_high": one.passes[1].high}
        metrics |= {
            f"{group}/forwards_per_answer": one.point.forwards_per_answer,
            f"{group}/tokens_per_forward": one.point.tokens_per_forward,
            f"{group}/tokens_per_second": one.point.tokens_per_second,
        }
        metrics |= {
            f"{group}/outcome/{name}": count / sum(one.point.outcomes.values())
            for name, count in one.point.outcomes.items()
        }
    tracker.log_metrics(metrics, 0)


def log_comparison(tracker: Tracker, benchmark: str, comparisons: Sequence[PolicyComparison]) -> None:
    """`eval/BENCHMARK/second_minus_first/...`."""
    metrics: dict[str, float] = {}
    for one in comparisons:
        group = f"eval/{benchmark}/second_minus_first/{one.name.replace(' ', '_')}"
        metrics |= {
            f"{group}/pass@1": one.quality.difference.value,
            f"{group}/p_value": one.quality.adjusted,
            f"{group}/fewer_forwards": one.fewer_forwards.value,
        }
    tracker.log_metrics(metrics, 0)


def log_repair(tracker: Tracker, slot: str, summaries: Sequence[RepairSummary]) -> None:
    """`eval/repair/THRESHOLD/...`; with two models the slot stands between."""
    prefix = "eval/repair" if slot == "model" else f"eval/repair/{slot}"
    metrics: dict[str, float] = {}
    for one in summaries:
        metrics |= {
            f"{prefix}/{one.name}/pass@1": one.passed.value,
            f"{prefix}/{one.name}/forwards": one.forwards.value,
            f"{prefix}/{one.name}/restored": one.restored,
        }
    tracker.log_metrics(metrics, 0)


def log_report(tracker: Tracker, config: EvaluateConfig) -> None:
    """The figure and the files of the finished report."""
    tracker.log_figure("frontier", config.out / "frontier.png")
    for name in REPORT_FILES:
        tracker.log_artifact(config.out / name)
