"""What each training stage adds on the tiny family: `python bench/stages.py`, two hours on one core, most of it pre-training.

Three models: masks only (examples/tiny/pretrain.yaml with `edit_share=0`), masks and edits (the embedded model, which is
that recipe's), and constrained orders on top (examples/tiny/distill.yaml). Of each: the frontier on held-out tasks, and
what it makes of right answers with 5 % of their tokens replaced (method: pipelines/repair.py). Writes
bench/results/stages.json, docs/figures/stages.png and the table in docs/training.md. Finished runs are kept in
runs/stages; one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.verifier import LocalVerifier
from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.pipelines.figures import new_figure, save_figure, style_axes
from fewstep.pipelines.frontier import SEQUENTIAL, accuracy_under_parallelism, measure, point_record
from fewstep.pipelines.repair import RepairSummary, corrupted, measure_repair
from fewstep.pipelines.task_source import prepared_plainly
from fewstep.pipelines.tasks.family import tasks as family_tasks
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.records import DecodePolicy, FrontierPoint, WeightVersion

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/stages.json"
RUNS = ROOT / "runs/stages"
FIGURE = ROOT / "docs/figures/stages.png"
MASK_ONLY, EDIT, DISTILL = "masks only", "+ edits", "+ constrained orders"
TRAINED: dict[str, tuple[str, ...]] = {
    MASK_ONLY: ("pretrain", "examples/tiny/pretrain.yaml", "edit_share=0.0"),
    DISTILL: ("distill", "examples/tiny/distill.yaml", "pool.num_samples=256", "steps=300"),
}
"""The stages whose model is not shipped, and the command of each."""
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
EDIT_THRESHOLDS = (0.5, 0.7, 0.9)
CORRUPTED_SHARE = 0.05
MAX_TOKENS = 110
TICKS = (5, 6, 8, 10, 15, 20, 30, 40)
COLOURS = {MASK_ONLY: "#8b5e34", EDIT: "#1763b6", DISTILL: "#15803d"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--tasks", type=int, default=500, help="held-out tasks, and drafts to repair")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folders = {
        MASK_ONLY: trained(arguments.runs / "mask-only", TRAINED[MASK_ONLY]),
        EDIT: embedded_model(),
        DISTILL: trained(arguments.runs / "distill", TRAINED[DISTILL]),
    }
    found = {name: measured(name, folder, arguments.tasks) for name, folder in folders.items()}
    best = max(100.0 * point.pass_at_1 for points, _ in found.values() for point in points)
    result = {
        "stages": {
            name: {
                "aup": accuracy_under_parallelism(points, best=best),
                "frontier": [point_record(point) for point in points],
                "repair": [one.record() for one in repairs],
            }
            for name, (points, repairs) in found.items()
        },
        "settings": {
            "num_tasks": arguments.tasks, "corrupted_share": CORRUPTED_SHARE, "dtype": "float32", "threads": 1,
            "commands": {name: " ".join(("fewstep", *keys)) for name, keys in TRAINED.items()},
        },
        "machine": machine_info(),
        "commit": git_commit(),
    }  # fmt: skip
    atomic_write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    if arguments.out == RESULTS:
        from bench.documents import fill

        draw(FIGURE, {name: points for name, (points, _) in found.items()})
        fill(ROOT / "docs/training.md", "stages", table(result))
    return 0


def trained(folder: Path, keys: Sequence[str]) -> Path:
    """The model of a finished job; runs it, or goes on with it, if it is not finished."""
    if not (folder / "model").is_dir():
        command = [sys.executable, "-m", "fewstep", *keys, f"out={folder}"]
        print(" ".join(command[2:]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
    return folder / "model"


def measured(name: str, folder: Path, count: int) -> tuple[list[FrontierPoint], list[RepairSummary]]:
    """The frontier, then the repairs; both on the same held-out specifications."""
    print(name, flush=True)
    model, tokenizer = load_model(folder, torch.float32)
    asked = family_tasks(count, 0, held_out=True)
    drafts = corrupted(asked, tokenizer, model.config, CORRUPTED_SHARE, seed=0)
    policies = [SEQUENTIAL, *(DecodePolicy(kind="threshold", threshold=value) for value in THRESHOLDS)]
    with LocalVerifier(2) as verifier:
        repairs = measure_repair(model, tokenizer, drafts, EDIT_THRESHOLDS, verifier.verify)
        engine = Engine(model, tokenizer, max_sequences=48, weight_version=WeightVersion("bench", 0, ""))
        prepared = prepared_plainly(asked, tokenizer, MAX_TOKENS)
        points = measure(prepared, policies, engine.generate, verifier.verify, tokenizer)
    return points, repairs


def draw(path: Path, frontiers: Mapping[str, Sequence[FrontierPoint]]) -> None:
    """pass@1 against forwards per answer, a line a stage."""
    figure = new_figure(7.0, 4.4)
    axes = figure.add_subplot()
    style_axes(axes, "After each training stage: quality against forwards")
    for name, points in frontiers.items():
        line = sorted(points, key=lambda point: point.forwards_per_answer)
        axes.plot(
            [point.forwards_per_answer for point in line], [point.pass_at_1 for point in line],
            color=COLOURS[name], marker="o", markersize=5, linewidth=1.6, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(TICKS, labels=[str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.set_xlabel("forwards per answer (fewer is faster)", fontsize=10)
    axes.set_ylabel("pass@1", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def table(result: Mapping[str, Any]) -> str:
    """The stages in Markdown."""
    shown = (SEQUENTIAL.label(), *(f"threshold_{value:g}" for value in (0.9, 0.7, 0.5)))
    lines = [
        f"| stage | {' | '.join(f'pass@1, {label}' for label in shown)} | AUP | repaired answers that pass |",
        f"|---|{'---:|' * (len(shown) + 2)}",
    ]
    for name, stage in result["stages"].items():
        points = {point["label"]: point for point in stage["frontier"]}
        cells = [
            f"{points[label]['pass_at_1']:.3f} ({points[label]['forwards_per_answer']:.1f} forwards)"
            for label in shown
        ]
        before, *after = stage["repair"]
        best = max(one["passed"]["value"] for one in after)
        lines.append(
            f"| {name} | {' | '.join(cells)} | {stage['aup']:.0f} | {before['passed']['value']:.3f} → {best:.3f} |"
        )
    settings = result["settings"]
    measured_with = (
        f"`python bench/stages.py`, {settings['num_tasks']} held-out tasks, {settings['dtype']}, one thread,"
        f" {result['machine']['cpu']}, commit {result['commit'][:9]}. Repair: {settings['corrupted_share']:.0%} of an"
        " answer's tokens replaced, the share that passes before and after editing at its best threshold."
    )
    lines += ["", measured_with]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.exit(main())
