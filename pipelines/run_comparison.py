"""`fewstep compare A B`: what differed between two runs, what came out, and what it cost."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.pipelines.frontier import standard_error
from fewstep.pipelines.paired_answers import paired_answers
from fewstep.pipelines.promotion import Mark, undominated
from fewstep.pipelines.run_comparison_figure import draw_comparison
from fewstep.pipelines.run_findings import cost_rows
from fewstep.pipelines.run_record import RunRecord, config_difference, load_run
from fewstep.pipelines.run_table import aligned
from fewstep.pipelines.tracking_settings import CompareConfig
from fewstep.platform.errors import ConfigError
from fewstep.platform.mlflow_store import project_uri
from fewstep.platform.records import FrontierPoint


def run(config: CompareConfig) -> None:
    """Prints the comparison and draws the figure.

    Raises:
        ConfigError: no such run, or the same twice.
        ResourceError: the store does not answer.
    """
    uri = project_uri(config.tracking_uri)
    with tempfile.TemporaryDirectory(prefix="fewstep-compare-") as scratch:
        first, second = (load_run(name, uri, Path(scratch)) for name in (config.first, config.second))
        if (
            first.stored is not None
            and second.stored is not None
            and first.stored.run_id == second.stored.run_id
        ):
            raise ConfigError("second", config.second, "another run than the first", "name another one")
        print(comparison_text(first, second), flush=True)
        if first.final_frontier() and second.final_frontier():
            draw_comparison(config.out, dict(_named(first, second)))
            print(f"\nwrote {config.out}", flush=True)


def comparison_text(first: RunRecord, second: RunRecord) -> str:
    """The whole comparison for a terminal."""
    names = [name for name, _ in _named(first, second)]
    parts = [
        _table(["", *names], _identity(first, second)),
        _differences(names, first, second),
        _frontiers(names, first, second),
        _significance(first, second),
        _table(["cost", *names], cost_rows(first, second)),
    ]
    return "\n\n".join(part for part in parts if part)


def _named(first: RunRecord, second: RunRecord) -> list[tuple[str, RunRecord]]:
    same = first.name == second.name
    return [
        (f"A: {first.name}" if same else first.name, first),
        (f"B: {second.name}" if same else second.name, second),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(aligned([list(header), *(list(row) for row in rows)])) if rows else ""


def _identity(first: RunRecord, second: RunRecord) -> list[list[str]]:
    def cells(label: str, of: Any) -> list[str]:
        return [label, of(first), of(second)]

    return [
        cells("run", lambda one: one.stored.run_id[:8] if one.stored else "not in the store"),
        cells("status", lambda one: one.stored.status if one.stored else "-"),
        cells("commit", lambda one: str(one.report.get("commit", "-"))[:12]),
        cells("measured on", lambda one: str(one.report.get("data", {}).get("held_out", "-"))),
        cells("trained on", lambda one: str(one.report.get("data", {}).get("training", "-"))),
        cells(
            "registered",
            lambda one: " ".join(one.stored.versions) if one.stored and one.stored.versions else "-",
        ),
    ]


def _differences(names: Sequence[str], first: RunRecord, second: RunRecord) -> str:
    found = config_difference(first.config, second.config)
    if not found:
        return "no key differs that says what the runs did"
    return _table(["key", *names], [[key, *values] for key, values in found.items()])


def _frontiers(names: Sequence[str], first: RunRecord, second: RunRecord) -> str:
    """The undominated points of each, and each run's cheapest point at the first one's bar."""
    rows = []
    for name, one in zip(names, (first, second), strict=True):
        points = {point.policy.label(): point for point in one.final_frontier()}
        for mark in undominated([_mark(point) for point in points.values()]):
            rows.append([name, *_cells(points[mark.label])])
    if not rows:
        return ""
    header = ["frontier", "policy", "pass@1", "forwards", "TPF", "tokens/s", "tasks"]
    return "\n".join(aligned([header, *rows], right=set(header[2:])))


def _mark(point: FrontierPoint) -> Mark:
    return Mark(point.policy.label(), point.pass_at_1, point.forwards_per_answer)


def _cells(point: FrontierPoint) -> list[str]:
    return [
        point.policy.label(), f"{point.pass_at_1:.3f} ± {standard_error(point):.3f}", f"{point.forwards_per_answer:.2f}",
        f"{point.tokens_per_forward:.2f}", f"{point.tokens_per_second:.0f}", str(point.num_tasks),
    ]  # fmt: skip


def _significance(first: RunRecord, second: RunRecord) -> str:
    policies = [one.report.get("policies", {}).get("after", "-") for one in (first, second)]
    found = paired_answers(first.answers("after"), second.answers("after"), "compare")
    if found is None:
        if first.answers("after") and second.answers("after"):
            return "not measured on the same tasks: no difference between the two can be claimed"
        return ""
    return f"second against first, paired over {found['num_tasks']} tasks ({policies[1]} against {policies[0]}):\n{found['text']}"
