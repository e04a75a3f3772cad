"""What a run's numbers say and do not say, in sentences."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fewstep.pipelines.run_record import RunRecord
from fewstep.pipelines.run_table import duration
from fewstep.pipelines.settings import RECORDING
from fewstep.platform.tracking import flatten_params

_GIB = 2**30
_DEFAULTS = {
    "refine": "fewstep.pipelines.settings:RefineConfig",
    "pretrain": "fewstep.pipelines.settings:PretrainConfig",
}


def answers_to_questions(record: RunRecord) -> list[tuple[str, str]]:
    """The questions a reader comes with, each with the run's answer."""
    report = record.report
    rows = [("What changed?", _what_changed(record)), ("On which data?", _which_data(record))]
    rows.append(("At what cost?", _what_cost(report)))
    rows.append(("How much faster, at which quality?", str(report.get("text", "")).replace("\n", " ")))
    significance = report.get("significance") or {}
    tested = f"{significance['text']} (paired over {significance['num_tasks']} tasks)" if significance else ""
    rows.append(("Is it significant?", tested))
    rows.append(("Which version is served?", _which_version(record)))
    return [(question, answer) for question, answer in rows if answer]


def cost_rows(*records: RunRecord) -> list[list[str]]:
    """The bills, a line an item: its name, then each run's; "-" where a run has none. Empty where no run has a bill."""
    reports = [record.report for record in records]
    bills = [report.get("cost", {}) for report in reports]
    if not any(bills):
        return []
    stages = [bill.get("seconds", {}) for bill in bills]
    rows = [
        [name, *(duration(stage.get(name)) for stage in stages)]
        for name in dict.fromkeys(name for stage in stages for name in stage)
    ]
    rows.append(["in all", *(duration(report.get("total_seconds")) for report in reports)])
    rows.append(["core hours", *(_shown(bill, "core_seconds", "{:.2f}", 3600) for bill in bills)])
    rows += [
        [name.removeprefix("num_"), *(_shown(bill, name, "{:,}") for bill in bills)]
        for name in ("num_rollouts", "num_tokens", "num_forwards")
    ]
    if any("peak_rss_bytes" in report for report in reports):
        rows.append(
            ["peak memory", *(_shown(report, "peak_rss_bytes", "{:.1f} GiB", _GIB) for report in reports)]
        )
    return rows


def _shown(values: Mapping[str, Any], key: str, form: str, unit: int = 1) -> str:
    if key not in values:
        return "-"
    return form.format(values[key] if unit == 1 else values[key] / unit)


def limits_of(record: RunRecord) -> list[str]:
    """What must be known before the numbers are used."""
    report, found = record.report, []
    points = record.final_frontier()
    if points:
        tasks = points[0].num_tasks
        half = 0.5 / tasks**0.5
        found.append(
            f"{tasks} tasks, one answer each: the standard error of a pass@1 is up to {half:.3f}, so smaller differences "
            "than about twice that say nothing by themselves."
        )
        found.append(
            "Tokens per second are this machine's with these replicas; forwards per answer and tokens per forward are the "
            "model's and the policy's."
        )
    if "machine" in report:
        machine = report["machine"]
        found.append(
            f"Measured on {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / _GIB:.0f} GiB."
        )
    if "+dirty" in str(report.get("commit", "")):
        found.append(
            "The code had changes that no commit holds: this run cannot be repeated from its commit alone."
        )
    if report.get("after", 0) is None:
        found.append("No policy of the refined model holds the bar: nothing was gained at equal quality.")
    significance = report.get("significance") or {}
    if significance and not significance["quality"]["significant"]:
        found.append(
            "The difference in pass@1 is within the noise of these tasks; only the difference in speed is claimed."
        )
    if report.get("resumed_at_step"):
        found.append(f"The run was interrupted and went on from step {report['resumed_at_step']}.")
    for name in ("replicas_replaced", "verifiers_replaced"):
        if report.get(name):
            found.append(
                f"{report[name]} {name.removesuffix('_replaced')} died and were replaced; their work was done again."
            )
    if "isolation" in report:
        found.append(f"Answers were judged in a sandbox with {report['isolation']}.")
    if record.stored is not None and record.stored.status != "FINISHED":
        found.append(
            f"The run's status is {record.stored.status}: {record.stored.tags.get('fewstep.closed', 'see its page')}."
        )
    return found


def _what_changed(record: RunRecord) -> str:
    started = (
        (record.stored.tags.get("model.source") if record.stored else None)
        or record.config.get("model")
        or ""
    )
    told = _unusual(record)
    parts = [f"started from {started}"] if started else []
    if "steps" in record.report:
        parts.append(f"{record.report['steps']} steps of {record.config.get('objective', 'training')}")
    parts.append(
        "all keys at their defaults"
        if not told
        else ", ".join(f"{key}={value}" for key, value in told.items())
    )
    return "; ".join(parts)


def _unusual(record: RunRecord) -> dict[str, str]:
    """Keys that are not the job's defaults."""
    path = _DEFAULTS.get(str(record.report.get("kind", "")))
    if path is None:
        return {}
    module, _, name = path.partition(":")
    defaults = flatten_params(getattr(importlib.import_module(module), name)().model_dump(mode="json"))
    return {
        key: value
        for key, value in record.config.items()
        if key.partition(".")[0] not in (*RECORDING, "model") and defaults.get(key) != value
    }


def _which_data(record: RunRecord) -> str:
    if record.stored is not None and record.stored.data:
        return "; ".join(f"{one['context']}: {one['name']} ({one['digest']})" for one in record.stored.data)
    return "; ".join(f"{side}: {name}" for side, name in record.report.get("data", {}).items())


def _what_cost(report: Mapping[str, Any]) -> str:
    bill = report.get("cost", {})
    if not bill:
        return ""
    return (
        f"{duration(report.get('refine_seconds'))} of refinement, {duration(report.get('total_seconds'))} in all, "
        f"{bill['core_seconds'] / 3600:.2f} core hours; {bill['num_rollouts']:,} rollouts, {bill['num_tokens']:,} tokens"
    )


def _which_version(record: RunRecord) -> str:
    versions = record.stored.versions if record.stored is not None else ()
    if versions:
        served = [version for version in versions if "champion" in version.partition("@")[2].split(",")]
        if served:
            return f"this run's: models:/{served[0].partition('@')[0]}, which is the champion"
        return f"not this run's; it made {', '.join(versions)}"
    return str(record.report.get("mlflow", {}).get("model_uri", ""))
