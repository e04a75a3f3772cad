"""What a refine run leaves behind: report.json, figures, the tracked run, the registered model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.figures import Panel, draw_curves, draw_frontier, draw_steps_histogram
from fewstep.pipelines.film_strip import Strip, draw_film_strips, token_texts
from fewstep.pipelines.frontier import (
    Speedup,
    accuracy_under_parallelism,
    compare,
    point_record,
    speedup_record,
)
from fewstep.pipelines.frontier_table import comparison_table
from fewstep.pipelines.publish import publish_model
from fewstep.pipelines.refine import Progress
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.tasks.family import Specification
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import DecodePolicy, FrontierPoint, Rollout
from fewstep.platform.trajectories import read_rollouts

FIGURES = ("frontier", "curves", "steps", "film")
REFINE_PANELS = (
    Panel("reward/pass_rate", "share of rollouts that pass"),
    Panel("rollout/forwards_per_answer", "forwards per rollout"),
    Panel("rollout/tokens_per_forward", "tokens per forward (TPF)"),
    Panel("rollout/threshold", "the sampler's confidence threshold"),
)


@dataclass(frozen=True)
class RefineResult:
    """What a refine run came to; `report` is what report.json holds."""

    model: Path
    model_uri: str
    tracking_uri: str
    run_id: str
    how_to_open: str
    served_policy: DecodePolicy
    speedup: Speedup
    table: str
    report: dict[str, Any]


def _report(before: list[FrontierPoint], after: list[FrontierPoint], progress: Progress) -> dict[str, Any]:
    speedup = compare(before, after)
    best = 100.0 * max(point.pass_at_1 for point in (*before, *after))
    return {
        **speedup_record(speedup),
        "frontier_before": [point_record(point) for point in before],
        "frontier_after": [point_record(point) for point in after],
        "aup_before": accuracy_under_parallelism(before, best=best),
        "aup_after": accuracy_under_parallelism(after, best=best),
        "steps": progress.step,
        "machine": machine_info(),
        "commit": git_commit(),
    }


def conclude(
    config: RefineConfig,
    tracker: MlflowTracker,
    tokenizer: Tokenizer,
    before: list[FrontierPoint],
    after: list[FrontierPoint],
    progress: Progress,
    extra: dict[str, Any],
) -> RefineResult:
    """Files, figures, MLflow and the registry, from what was measured; `extra` goes into the report as it is."""
    speedup, out = compare(before, after), config.out
    table = comparison_table(before, after, speedup)
    atomic_write_text(out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in progress.history))
    served = speedup.after or after[0]
    # A model that lost the bar, or is slower at it, must not become what others serve.
    held = speedup.speedup_forwards is not None and speedup.speedup_forwards >= 1.0
    _draw(config, tokenizer, before, after, served, progress)
    for name in FIGURES:
        tracker.log_figure(name, out / f"{name}.png", step=progress.step)
    tracker.log_artifact(out / "trajectories", "trajectories")
    tracker.log_artifact(out / "rollouts", "rollouts")
    summary = _summary(speedup, served)
    tracker.log_metrics(_measured(speedup.before), step=0)
    tracker.log_metrics(summary, progress.step)
    uri = publish_model(
        tracker,
        out / "model",
        name=config.register_as,
        alias="champion" if held else "candidate",
        metrics=summary,
        input_example=Specification.parse(_kept(out, "after", served)[0].task_id).prompt,
        policy=served.policy,
        step=progress.step,
        dataset="family-held-out",
    )
    report = {**_report(before, after, progress), **extra, "held_bar": held}
    report["mlflow"] = {"tracking_uri": tracker.uri, "run_id": tracker.run_id, "model_uri": uri}
    atomic_write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    tracker.log_artifact(out / "report.json")
    print(f"\n{table}\n", flush=True)
    return RefineResult(
        model=out / "model",
        model_uri=uri,
        tracking_uri=tracker.uri,
        run_id=tracker.run_id,
        how_to_open=tracker.how_to_open,
        served_policy=served.policy,
        speedup=speedup,
        table=table,
        report=report,
    )


def _draw(
    config: RefineConfig,
    tokenizer: Tokenizer,
    before: list[FrontierPoint],
    after: list[FrontierPoint],
    served: FrontierPoint,
    progress: Progress,
) -> None:
    """The four figures: the frontiers, the curves, the forwards per answer, and one answer's film before and after."""
    speedup, out = compare(before, after), config.out
    draw_frontier(out / "frontier.png", before, after, speedup=speedup)
    draw_curves(out / "curves.png", {config.objective: progress.history}, REFINE_PANELS)
    rollouts = {"before": _kept(out, "before", speedup.before), "after": _kept(out, "after", served)}
    draw_steps_histogram(
        out / "steps.png", *([rollout.trajectory for rollout in rollouts[name]] for name in rollouts)
    )
    block_size = ModelConfig.load(out / "model").block_size
    strips = [
        Strip(
            f"{name} refinement, {chosen.policy.label()}: {own[0].trajectory.num_tokens} tokens in "
            f"{own[0].trajectory.forwards} forwards, {own[0].verdict.outcome}",
            own[0].trajectory,
            token_texts(tokenizer, own[0].trajectory),
        )
        for (name, own), chosen in zip(rollouts.items(), (speedup.before, served), strict=True)
    ]
    draw_film_strips(out / "film.png", strips, block_size)


def _kept(out: Path, name: str, point: FrontierPoint) -> list[Rollout]:
    return read_rollouts(out / "trajectories" / f"{name}_{point.policy.label()}.parquet")


def _summary(speedup: Speedup, served: FrontierPoint) -> dict[str, float]:
    values = _measured(served)
    if speedup.speedup_forwards is not None and speedup.speedup_vs_sequential is not None:
        values["eval/heldout/speedup_forwards"] = speedup.speedup_forwards
        values["eval/heldout/speedup_vs_sequential"] = speedup.speedup_vs_sequential
    return values


def _measured(point: FrontierPoint) -> dict[str, float]:
    return {
        "eval/heldout/pass_at_1": point.pass_at_1,
        "eval/heldout/forwards_per_answer": point.forwards_per_answer,
        "eval/heldout/tokens_per_forward": point.tokens_per_forward,
    }
