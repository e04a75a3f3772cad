"""`fewstep report RUN`: one run as a page that needs no network, and the same as Markdown."""

from __future__ import annotations

import base64
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.pipelines.frontier_table import comparison_table, frontier_table
from fewstep.pipelines.run_findings import answers_to_questions, cost_rows, limits_of
from fewstep.pipelines.run_record import RunRecord, load_run
from fewstep.pipelines.run_samples import outcome_groups
from fewstep.pipelines.tracking_settings import ReportConfig
from fewstep.platform.artifacts import atomic_write_bytes, atomic_write_text
from fewstep.platform.mlflow_store import project_uri

_TEMPLATES = Path(__file__).parent
# What each figure shows, in the order of the page; figures of other names come last, under their name.
CAPTIONS = {
    "frontier": "Speed against quality: pass@1 over forwards per answer, every policy before and after.",
    "steps": "How many answers took how many forwards.",
    "curves": "Training: reward, length and speed of the rollouts by step.",
    "curve": "Training by step.",
    "sync": "Where the time of a step goes: weight push, generation, verification, training.",
    "film": "One held-out answer, forward by forward, before and after.",
    "film_2": "Another answer, forward by forward.",
    "film_3": "Another answer, forward by forward.",
    "sweep": "The trials' frontiers.",
}


def run(config: ReportConfig) -> None:
    """Writes report.html and report.md.

    Raises:
        ConfigError: no such run.
        ResourceError: the store does not answer.
    """
    uri = project_uri(config.tracking_uri)
    with tempfile.TemporaryDirectory(prefix="fewstep-report-") as scratch:
        record = load_run(config.run, uri, Path(scratch))
        own = Path(config.run).is_dir()
        out = config.out or (Path(config.run) if own else Path("runs/reports") / record.name)
        write_report(record, out, config.examples)
    print(f"wrote {out / 'report.html'} and {out / 'report.md'}", flush=True)


def write_report(record: RunRecord, out: Path, examples: int = 2) -> None:
    """Both forms of the page; the Markdown's figures are put beside it.

    Args:
        out: folder, made when missing.
        examples: answers shown of each outcome class.
    """
    content = report_content(record, examples)
    figures = content["figures"]
    for figure in figures:
        target = out / "figures" / f"{figure['name']}.png"
        if target.resolve() != figure["path"].resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(target, figure["path"].read_bytes())
        figure["link"] = f"figures/{figure['name']}.png"
        figure["data"] = base64.b64encode(figure["path"].read_bytes()).decode()
    atomic_write_text(out / "report.html", _render("run_report.html.jinja", content, escaped=True))
    atomic_write_text(out / "report.md", _render("run_report.md.jinja", content, escaped=False))


def report_content(record: RunRecord, examples: int) -> dict[str, Any]:
    """Everything the page says, form aside."""
    stored = record.stored
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(stored.start_ms / 1000)) if stored else ""
    return {
        "title": record.name,
        "kind": str(record.report.get("kind", "run")),
        "run_id": stored.run_id if stored else "",
        "status": stored.status if stored else "read from its folder",
        "started": started,
        "verdict": str(record.report.get("text", "")),
        "questions": answers_to_questions(record),
        "frontier": _frontier(record),
        "figures": _figures(record),
        "outcomes": outcome_groups(record, examples),
        "cost": cost_rows(record),
        "data": [dict(one) for one in stored.data] if stored else [],
        "metrics": sorted(stored.metrics.items()) if stored and not record.report else [],
        "config": sorted(record.config.items()),
        "resumed": _resumed(record),
        "limits": limits_of(record),
    }


def _frontier(record: RunRecord) -> list[dict[str, str]]:
    """Tables as text, each under its name; side by side for a refinement."""
    frontiers = record.frontiers()
    bar = record.report.get("bar")
    if "before" in frontiers and "after" in frontiers:
        from fewstep.pipelines.frontier import compare

        before, after = frontiers["before"], frontiers["after"]
        speedup = compare(before, after)
        return [
            {
                "name": "before and after",
                "plain": comparison_table(before, after, speedup),
                "markdown": comparison_table(before, after, speedup, "markdown"),
            }
        ]
    return [
        {
            "name": name,
            "plain": frontier_table(points, float(bar or 0.0)),
            "markdown": frontier_table(points, float(bar or 0.0), "markdown"),
        }
        for name, points in frontiers.items()
    ]


def _figures(record: RunRecord) -> list[dict[str, Any]]:
    order = {name: place for place, name in enumerate(CAPTIONS)}
    names = sorted(record.figures, key=lambda name: (order.get(name, len(order)), name))
    return [
        {"name": name, "path": record.figures[name], "caption": CAPTIONS.get(name, name.replace("_", " "))}
        for name in names
    ]


def _resumed(record: RunRecord) -> list[dict[str, str]]:
    """What the configuration lost or gained when the run was gone on with, oldest first."""
    return [
        {"when": path.stem, "difference": path.read_text().strip()}
        for path in sorted((record.folder / "resumed").glob("*.diff"))
    ]


def _render(name: str, content: Mapping[str, Any], *, escaped: bool) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=escaped, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["fence"] = _fence
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(name).render(content)


def _fence(text: str) -> str:
    """A Markdown code block that no text can leave."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"{mark}\n{text}\n{mark}"
