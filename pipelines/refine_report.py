"""What a refine run leaves behind: report.json, figures, the tracked run, the registered model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.frontier import (
    Speedup,
    accuracy_under_parallelism,
    compare,
    point_record,
    speedup_record,
)
from fewstep.pipelines.frontier_table import comparison_table
from fewstep.pipelines.paired_answers import paired_answers
from fewstep.pipelines.promote import promote
from fewstep.pipelines.promotion import CANDIDATE, CHAMPION, standing_facts
from fewstep.pipelines.publish import publish_model
from fewstep.pipelines.refine import Progress
from fewstep.pipelines.rollout_samples import sample_table
from fewstep.pipelines.run_cost import run_cost
from fewstep.pipelines.run_figures import draw_films, draw_run
from fewstep.pipelines.run_findings import answers_to_questions
from fewstep.pipelines.run_record import folder_record
from fewstep.pipelines.run_report import write_report
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.task_source import TaskSource
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.errors import UserError
from fewstep.platform.mlflow_store import shown_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import DecodePolicy, FrontierPoint, Rollout
from fewstep.platform.trajectories import describe_rollouts, read_rollouts, write_rollouts


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


def _report(
    config: RefineConfig,
    before: list[FrontierPoint],
    after: list[FrontierPoint],
    speedup: Speedup,
    progress: Progress,
) -> dict[str, Any]:
    best = 100.0 * max(point.pass_at_1 for point in (*before, *after))
    return {
        "kind": "refine",
        **speedup_record(speedup),
        "frontier_before": [point_record(point) for point in before],
        "frontier_after": [point_record(point) for point in after],
        "aup_before": accuracy_under_parallelism(before, best=best),
        "aup_after": accuracy_under_parallelism(after, best=best),
        "steps": progress.step,
        "machine": machine_info(),
        "commit": git_commit(),
        "settings": config.model_dump(mode="json"),
    }


def conclude(
    config: RefineConfig,
    tracker: MlflowTracker,
    tokenizer: Tokenizer,
    source: TaskSource,
    before: list[FrontierPoint],
    after: list[FrontierPoint],
    progress: Progress,
    extra: dict[str, Any],
) -> RefineResult:
    """Files, figures, MLflow and the registry, from what was measured.

    Args:
        extra: goes into the report as it is; `total_seconds` is read from it.
    """
    speedup, out = compare(before, after), config.out
    table = comparison_table(before, after, speedup)
    atomic_write_text(out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in progress.history))
    served = speedup.after or _same_policy(after, speedup.before)
    # A model that lost the bar, or is slower at it, must not become what others serve.
    held = speedup.speedup_forwards is not None and speedup.speedup_forwards >= 1.0
    answers = {"before": _kept(out, "before", speedup.before), "after": _kept(out, "after", served)}
    policies = {"before": speedup.before.policy.label(), "after": served.policy.label()}
    figures = draw_run(out, config.objective, progress.history, before, after, speedup, answers)
    block_size = ModelConfig.load(out / "model").block_size
    figures += draw_films(out, answers, policies, tokenizer, block_size)
    for name in figures:
        tracker.log_figure(name, out / f"{name}.png", step=progress.step)
    _log_rollouts(config, tracker, source, answers)
    tracker.log_metrics(_measured(speedup.before), step=0)
    uri = _registered(config, tracker, source, before, after, speedup, served, progress.step)
    uri = _promoted(config, tracker, uri) if held else uri
    report = {
        **_report(config, before, after, speedup, progress),
        **extra,
        "held_bar": held,
        "policies": policies,
    }
    report["cost"] = run_cost(
        progress.history, config.prompts_per_step * config.group_size, extra["total_seconds"]
    )
    report["significance"] = paired_answers(answers["before"], answers["after"], "refine")
    report["figures"] = figures
    report["mlflow"] = {"tracking_uri": shown_uri(tracker.uri), "run_id": tracker.run_id, "model_uri": uri}
    atomic_write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    for name in ("report.json", "history.jsonl"):
        tracker.log_artifact(out / name)
    _tell(tracker, out)
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


def _registered(
    config: RefineConfig,
    tracker: MlflowTracker,
    source: TaskSource,
    before: list[FrontierPoint],
    after: list[FrontierPoint],
    speedup: Speedup,
    served: FrontierPoint,
    step: int,
) -> str:
    """The address of the candidate that the refined model becomes, or its folder while the store is away."""
    return publish_model(
        tracker,
        config.out / "model",
        name=config.register_as,
        alias=CANDIDATE,
        metrics=_summary(speedup, served),
        input_example=source.held_out[0].task.prompt,
        policy=served.policy,
        step=step,
        dataset=source.held_out_set.name,
        facts=standing_facts(after, before, speedup, source.held_out_set.reference),
    )  # fmt: skip


def _promoted(config: RefineConfig, tracker: MlflowTracker, uri: str) -> str:
    """The address after an attempt to make the candidate champion; a candidate that is not promoted is no failure."""
    if not uri.startswith("models:/"):
        return uri  # the store is away; the model is registered when it is back
    try:
        result = promote(uri, tracker.uri)
    except UserError as error:
        print(f"{uri} stays a candidate: {error}", flush=True)
        return uri
    if not result.promoted:
        reasons = "; ".join(result.judgement.reasons) or "it is nowhere better"
        print(f"{uri} stays a candidate, the champion keeps its place: {reasons}", flush=True)
        return uri
    return f"models:/{config.register_as}@{CHAMPION}"


def _log_rollouts(
    config: RefineConfig, tracker: MlflowTracker, source: TaskSource, answers: Mapping[str, list[Rollout]]
) -> None:
    """Rollouts by reference: an index of the files with their digests; the compared held-out answers as files; and a
    table of a few of each step."""
    out = config.out
    files = [*(out / "rollouts").glob("*.parquet"), *(out / "trajectories").glob("*.parquet")]
    index = describe_rollouts(files, out)
    atomic_write_text(
        out / "trajectories.json", json.dumps({"folder": str(out.resolve()), "files": index}, indent=1) + "\n"
    )
    tracker.log_artifact(out / "trajectories.json")
    prompts = {one.task.task_id: one.task.prompt for one in source.held_out}
    for when, rollouts in answers.items():
        path = out / "answers" / f"{when}.parquet"
        facts = {"model": when, "policy": rollouts[0].trajectory.policy.label(), "prompts": prompts}
        write_rollouts(path, rollouts, facts)
        tracker.log_artifact(path, "answers")
    trained = [entry for entry in index if entry["path"].startswith("rollouts/")]
    if trained:
        digest = hashlib.sha256("".join(entry["sha256"] for entry in trained).encode()).hexdigest()
        tracker.log_dataset(
            "rollouts", digest=digest, context="training", source=str((out / "rollouts").resolve()),
            profile={"num_files": len(trained), "num_rows": sum(entry["rows"] for entry in trained)},
        )  # fmt: skip
        tracker.log_table("samples", sample_table(out / "rollouts", config.seed))


def _tell(tracker: MlflowTracker, out: Path) -> None:
    """The answers to a reader's questions at the top of the run's page, and the whole report among its files."""
    record = folder_record(out)
    write_report(record, out)
    lines = [f"**{question}** {answer}" for question, answer in answers_to_questions(record)]
    tracker.set_tags({"mlflow.note.content": "\n\n".join(lines)})
    tracker.log_artifact(out / "report.html")


def _same_policy(points: list[FrontierPoint], wanted: FrontierPoint) -> FrontierPoint:
    """The point of the same policy; a frontier is measured at the same ones before and after."""
    return next(point for point in points if point.policy == wanted.policy)


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
