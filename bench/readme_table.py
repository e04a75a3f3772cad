"""Fill the README's results from finished runs: `python bench/readme_table.py [runs/demo/report.json]`.

Everything between the two marker lines is replaced: a table of the demo, its figure (copied to docs/figures), and the
same table of the long refinement where its report has been committed. Numbers come from the reports and from nowhere
else; each table names the machine and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.platform.artifacts import atomic_write_bytes
from fewstep.platform.errors import ResourceError, UserError

ROOT = Path(__file__).resolve().parents[1]
MARKS = "results"
GIB = 2**30

Report = Mapping[str, Any]


def main() -> int:
    from bench.documents import fill

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, nargs="?", default=ROOT / "runs/demo/report.json")
    parser.add_argument("--long", type=Path, default=ROOT / "bench/results/refine-tiny.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    try:
        parts = [section("`make demo`", read_report(arguments.report))]
        folder = arguments.readme.resolve().parent
        copy = folder / "docs" / "figures" / "demo-frontier.png"
        parts += figure(arguments.report.with_name("frontier.png"), copy, folder)
        if arguments.long.is_file():
            parts.append(section("`fewstep refine examples/tiny/refine.yaml`", read_report(arguments.long)))
            parts += figure(arguments.long.with_suffix(".png"), arguments.long.with_suffix(".png"), folder)
        fill(arguments.readme, MARKS, "\n\n".join(parts))
    except UserError as error:
        print(f"readme_table: error: {error}", file=sys.stderr)
        return 2
    return 0


def read_report(path: Path) -> Report:
    """A report of `fewstep demo` or `fewstep refine`.

    Raises:
        ResourceError: no such file, or not such a report.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResourceError(
            str(path), error, "the report.json of a finished run", "run `make demo` first"
        ) from error
    missing = {"sequential", "before", "after", "bar", "refine_seconds", "machine", "commit"} - report.keys()
    if missing:
        raise ResourceError(
            str(path),
            f"no {sorted(missing)}",
            "the report of `fewstep demo` or `refine`",
            "name another file",
        )
    return report


def section(title: str, report: Report) -> str:
    """One run as Markdown: a table, the speedups, and where and how long it ran."""
    rows = [
        row("unrefined, one token per step", report["sequential"]),
        row("unrefined, cheapest policy at the bar", report["before"]),
    ]
    if report["after"] is not None:
        rows.append(row("**refined**, cheapest policy at the bar", report["after"]))
    head = "| model | policy | pass@1 | forwards per answer | TPF | tokens/s |\n|---|---|---:|---:|---:|---:|"
    return f"{title}, {report['before']['num_tasks']} held-out tasks, one answer each:\n\n" + "\n".join(
        [head, *rows, "", verdict(report), provenance(report)]
    )


def row(name: str, point: Report) -> str:
    return (
        f"| {name} | {point['label']} | {point['pass_at_1']:.3f} ± {point['pass_at_1_standard_error']:.3f} "
        f"| {point['forwards_per_answer']:.2f} | {point['tokens_per_forward']:.2f} "
        f"| {point['tokens_per_second']:.0f} |"
    )


def verdict(report: Report) -> str:
    """What the bar is and how much was won at it."""
    bar = (
        f"The bar is the unrefined model's pass@1 at one token per step, less one point: {report['bar']:.3f}."
    )
    if report["after"] is None:
        return f"{bar} No policy of the refined model reaches it."
    return (
        f"{bar} **{report['speedup_forwards']:.2f}x fewer forwards** than the unrefined model's best policy, "
        f"{report['speedup_vs_sequential']:.2f}x fewer than one token per step."
    )


def provenance(report: Report) -> str:
    """Seconds, memory, machine and commit in one sentence or two."""
    machine = report["machine"]
    commit, dirty, _ = report["commit"].partition("+dirty")
    memory = f", peak memory {report['peak_rss_bytes'] / GIB:.1f} GiB" if "peak_rss_bytes" in report else ""
    total = f", {report['total_seconds'] / 60:.1f} minutes in all" if "total_seconds" in report else ""
    return (
        f"Refined for {report['refine_seconds'] / 60:.1f} minutes{total}{memory}. {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_bytes'] / GIB:.0f} GiB; commit `{commit[:12]}{dirty}`."
    )


def figure(source: Path, copy: Path, folder: Path) -> list[str]:
    """A link, relative to `folder`, to a figure that is put at `copy`; nothing where there is no figure."""
    if not source.is_file():
        return []
    if source != copy:
        atomic_write_bytes(copy, source.read_bytes())
    link = Path(os.path.relpath(copy.resolve(), folder)).as_posix()
    return [f"![pass@1 against forwards per answer, before and after refinement]({link})"]


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.exit(main())
