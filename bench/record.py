"""Keep a finished refinement's figures in the tree: `python bench/record.py RUN NAME`.

Copies RUN/report.json to bench/results/NAME.json, RUN/frontier.png beside it and RUN/film.png to docs/figures, keeps
the curves' columns of RUN/history.jsonl as NAME-history.jsonl, and redraws docs/figures/refine-curves.png from every
history kept so far.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from fewstep.pipelines.figures import draw_curves
from fewstep.pipelines.run_figures import REFINE_PANELS
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.errors import ResourceError, UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "figures"
COLUMNS = ("step", "seconds", *(panel.key for panel in REFINE_PANELS))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished `fewstep refine` or `fewstep demo`")
    parser.add_argument("name", help="of the files in bench/results")
    arguments = parser.parse_args()
    try:
        record(arguments.run, arguments.name)
    except UserError as error:
        print(f"record: error: {error}", file=sys.stderr)
        return 2
    return 0


def record(run: Path, name: str) -> None:
    """Copy one run's report, frontier and history; then redraw the curves of all.

    Raises:
        ResourceError: the run is not finished.
    """
    report = _read(run / "report.json")
    atomic_write_text(RESULTS / f"{name}.json", json.dumps(_portable(report), indent=2) + "\n")
    shutil.copyfile(run / "frontier.png", RESULTS / f"{name}.png")
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    kept = [{key: round(row[key], 5) for key in COLUMNS} for row in rows]
    atomic_write_text(RESULTS / f"{name}-history.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    histories = {
        path.name.removesuffix("-history.jsonl"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(RESULTS.glob("*-history.jsonl"))
    }
    FIGURES.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "film.png", FIGURES / f"{name}-film.png")
    draw_curves(FIGURES / "refine-curves.png", histories, REFINE_PANELS)


def _read(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResourceError(
            str(path), error, "the report.json of a finished run", "wait for it to end"
        ) from error
    return report


def _portable(report: dict[str, Any]) -> dict[str, Any]:
    """Without the address of a store that exists on one machine only."""
    return {key: value for key, value in report.items() if key != "mlflow"}


if __name__ == "__main__":
    sys.exit(main())
