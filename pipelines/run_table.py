"""`fewstep runs`: the runs of a store as a table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from fewstep.pipelines.tracking_settings import RunsConfig
from fewstep.platform.mlflow_runs import RunStore, StoredRun
from fewstep.platform.mlflow_store import project_uri, shown_uri

_HEADER = ("run", "name", "status", "started", "took", "pass@1", "forwards", "speedup", "registered")
_RIGHT = {"took", "pass@1", "forwards", "speedup"}


def run(config: RunsConfig) -> None:
    """Prints the newest runs, nested ones under their parent.

    Raises:
        ConfigError: no such store or experiment.
        ResourceError: the store does not answer.
    """
    uri = project_uri(config.tracking_uri)
    runs = RunStore(uri).runs(config.experiment, config.limit)
    print(runs_table(runs) if runs else f"{shown_uri(uri)} has no runs", flush=True)


def runs_table(runs: Sequence[StoredRun]) -> str:
    """The table; a run whose parent is listed stands below it."""
    listed = {run.run_id for run in runs}
    top = [run for run in runs if run.parent_id not in listed]
    rows = []
    for run in top:
        rows.append(_cells(run, ""))
        rows += [_cells(child, "  ") for child in runs if child.parent_id == run.run_id]
    return "\n".join(aligned([list(_HEADER), *rows], right=_RIGHT))


def duration(seconds: float | None) -> str:
    """`0.4 s`, `42 s`, `3.5 min`, `1.2 h`; `-` for a run that has not ended."""
    if seconds is None:
        return "-"
    if seconds < 100.0:
        return f"{seconds:.{1 if seconds < 10.0 else 0}f} s"
    return f"{seconds / 60.0:.1f} min" if seconds < 6000.0 else f"{seconds / 3600.0:.1f} h"


def aligned(rows: Sequence[Sequence[str]], right: set[str] | None = None) -> list[str]:
    """Lines of a table whose first row is its header; columns named in `right` are set flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    flush = [name in (right or set()) for name in rows[0]]
    lines = [
        "  ".join(
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, flush, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _cells(run: StoredRun, indent: str) -> list[str]:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.start_ms / 1000))
    status = f"{run.status}*" if "fewstep.closed" in run.tags else run.status
    return [
        indent + run.run_id[:8], run.name, status, started, duration(run.seconds),
        _metric(run.metrics, "pass_at_1", 3), _metric(run.metrics, "forwards_per_answer", 2),
        _metric(run.metrics, "speedup_forwards", 2, "x"), " ".join(run.versions) or "-",
    ]  # fmt: skip


def _metric(metrics: Mapping[str, float], name: str, digits: int, unit: str = "") -> str:
    """The last value of `eval/heldout/NAME`; a refinement's, the only one there is a single of."""
    value = metrics.get(f"eval/heldout/{name}")
    return "-" if value is None else f"{value:.{digits}f}{unit}"
