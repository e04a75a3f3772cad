"""What refinement reaches on the tiny family: `python bench/refine_tiny.py`, a quarter of an hour a seed on two cores.

Refines examples/tiny/refine.yaml once a seed, measures every refined model on tasks of two kinds it was not refined on,
and writes bench/results/refine-tiny.json: the first seed's report (bench/readme_table.py reads it) and over all seeds
the mean and spread of the speedups, what pass@1 lost, AUP before and after, pass@1 at every threshold, the out-of-domain check and
the share of time outside generation, verification and training. `--ablations` runs what ABLATIONS lists as well, one seed
each. Finished runs are kept in runs/refine-tiny and not repeated; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.verifier import LocalVerifier
from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.pipelines.frontier import SEQUENTIAL, measure
from fewstep.pipelines.task_source import prepared_plainly
from fewstep.pipelines.tasks.family import OPERATIONS, REDUCTIONS, Specification
from fewstep.pipelines.tasks.family import tasks as family_tasks
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.records import Task, WeightVersion
from fewstep.platform.rng import generator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "refine-tiny.json"
RUNS = ROOT / "runs" / "refine-tiny"
RECIPE = ROOT / "examples" / "tiny" / "refine.yaml"
GOAL, AIM, MAX_DROP_POINTS, MAX_OVERHEAD = 2.5, 5.0, 2.0, 0.10
NUM_OUT_OF_DOMAIN = 300
SMOKE = (
    "steps=2",
    "prompts_per_step=8",
    "num_eval_tasks=8",
    "sweep.thresholds=[0.9]",
    "sweep.tokens_per_step=[]",
)
SEED = (
    "objective=seed", "objective_options={speed_weight: 1.0, ramp: 0.2, kl: 0.01}", "temperature=1.0",
    "learning_rate=5e-4", "prompts_per_step=32", "group_size=8", "steps=90", "trainer.precision=fp32",
)  # fmt: skip
ABLATIONS: dict[str, tuple[str, ...]] = {
    "objective: seed": SEED,
    "objective: trace": (*SEED, "objective=trace", "objective_options={kl: 0.01}"),
    "objective: coupled": (*SEED, "objective=coupled", "objective_options={kl: 0.01}"),
    "surrogate: adjacent": (*SEED, "objective_options={surrogate: adjacent, kl: 0.01}"),
    "gating: additive": (*SEED, "objective_options={gating: additive, kl: 0.01}"),
    "speed weight: from the start": (*SEED, "objective_options={ramp: 0.0, kl: 0.01}"),
    "speed weight: none": (*SEED, "objective_options={speed_weight: 0.0, kl: 0.01}"),
    "curriculum: threshold fixed at 0.9": ("curriculum.step=0.0",),
    "curriculum: gated by held-out tasks": ("held_out_checks={every: 20, gates_curriculum: true}",),
    "certainty term: none": ("objective_options={keep: 1, certainty: 0.0}",),
    "retention: pairs of the pre-training": ("retain={sources: [family], num_documents: 4096}",),
    "retention: blurred prompts": ("retain={noise: 0.15}",),
}
"""What each changes of examples/tiny/refine.yaml; a later value of a key counts."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablations", action="store_true", help="run those of ABLATIONS, too")
    parser.add_argument("--smoke", action="store_true", help="two steps and eight tasks: does it run at all?")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    smoke = SMOKE if arguments.smoke else ()
    folders = [refined(arguments.runs / f"seed-{seed}", (f"seed={seed}", *smoke)) for seed in arguments.seeds]
    count = 8 if arguments.smoke else NUM_OUT_OF_DOMAIN
    result = {
        **json.loads((folders[0] / "report.json").read_text()),
        **over_seeds([json.loads((folder / "report.json").read_text()) for folder in folders]),
        "seeds": arguments.seeds,
        "out_of_domain": out_of_domain(folders, count),
        "machine": machine_info(),
        "commit": git_commit(),
    }
    result.pop("mlflow", None)  # the address of a store that exists on one machine only
    kept = json.loads(arguments.out.read_text()).get("ablations", {}) if arguments.out.is_file() else {}
    result |= {"ablations": kept, "goals": goals(result)}
    keep(result, arguments.out)
    shutil.copyfile(folders[0] / "frontier.png", arguments.out.with_suffix(".png"))
    for number, (name, keys) in enumerate(ABLATIONS.items() if arguments.ablations else ()):
        kept[name] = ablation(arguments.runs / f"ablation-{number:02d}", (*keys, *smoke), count)
        keep(result, arguments.out)  # each is minutes of work
    shown = ("speedup_forwards_mean", "speedup_forwards_std", "speedup_vs_sequential_mean", "pass_at_1_drop_points_mean", "aup_before", "aup_after", "goals")  # fmt: skip
    print(json.dumps({key: result[key] for key in shown}, indent=2))
    return 0


def keep(result: dict[str, Any], path: Path) -> None:
    # Paths of this machine say nothing elsewhere.
    text = json.dumps(result, indent=2).replace(f"{ROOT}/", "")
    atomic_write_text(path, text + "\n")


def refined(folder: Path, keys: Sequence[str]) -> Path:
    """The folder of a finished refinement; runs it, or goes on with it, if it is not finished."""
    if not (folder / "report.json").is_file():
        command = [sys.executable, "-m", "fewstep", "refine", str(RECIPE), f"out={folder}", *keys]
        print(" ".join(command[2:]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads; a seed whose refined model lost the bar has no speedup and counts as 0."""
    forwards = [report["speedup_forwards"] or 0.0 for report in reports]
    sequential = [report["speedup_vs_sequential"] or 0.0 for report in reports]
    drops = [
        100.0 * (report["sequential"]["pass_at_1"] - report["after"]["pass_at_1"])
        for report in reports
        if report["after"] is not None
    ]
    return {
        "speedup_forwards_mean": statistics.mean(forwards),
        "speedup_forwards_std": statistics.stdev(forwards) if len(forwards) > 1 else 0.0,
        "speedup_vs_sequential_mean": statistics.mean(sequential),
        "pass_at_1_drop_points_mean": statistics.mean(drops) if drops else None,
        "aup_before": statistics.mean(report["aup_before"] for report in reports),
        "aup_after": statistics.mean(report["aup_after"] for report in reports),
        "aup_after_std": statistics.stdev(report["aup_after"] for report in reports)
        if len(reports) > 1
        else 0.0,
        "per_seed": {
            "speedup_forwards": forwards,
            "speedup_vs_sequential": sequential,
            "pass_at_1_drop_points": drops,
            "refine_seconds": [report["refine_seconds"] for report in reports],
            "overhead_share": [overhead(report) for report in reports],
        },
        "worst_policy": [worst_policy(report) for report in reports],
    }


def worst_policy(report: dict[str, Any]) -> dict[str, Any]:
    """The policy at which the refined model gained least over the unrefined one, in points of pass@1."""
    before = {point["label"]: point["pass_at_1"] for point in report["frontier_before"]}
    gains = {
        point["label"]: 100.0 * (point["pass_at_1"] - before[point["label"]])
        for point in report["frontier_after"]
    }
    label = min(gains, key=lambda name: gains[name])
    return {"policy": label, "gain_points": gains[label]}


def overhead(report: dict[str, Any]) -> float:
    """Share of the steps' wall time outside generation, verification and training."""
    seconds = report["cost"]["seconds"]
    inside = sum(seconds[name] for name in ("generate", "verify", "train"))
    steps = sum(value for name, value in seconds.items() if name != "outside")
    return 1.0 - inside / steps if steps else 0.0


def out_of_domain(folders: Sequence[Path], count: int) -> dict[str, Any]:
    """pass@1 at one token per step on tasks of kinds that nobody refined on, before and after."""
    found: dict[str, Any] = {}
    for name, asked in out_of_domain_tasks(count).items():
        before, *after = [
            pass_at_1(folder, asked) for folder in (embedded_model(), *(f / "model" for f in folders))
        ]
        drops = [100.0 * (before - one) for one in after]
        found[name] = {
            "num_tasks": len(asked), "pass_at_1_before": before, "pass_at_1_after": after,
            "drop_points_mean": statistics.mean(drops), "drop_points_max": max(drops),
        }  # fmt: skip
    return found


def out_of_domain_tasks(count: int) -> dict[str, list[Task]]:
    """Two kinds that the embedded model solves in part: an argument of another name, and four operations where it has seen
    at most three."""
    renamed = [
        replace(task, task_id=f"renamed: {task.task_id}", prompt=task.prompt.replace("(xs)", "(a)"))
        for task in family_tasks(count, 0, held_out=True)
    ]
    draws, longer = generator("four-operations"), dict[str, Task]()
    while len(longer) < count:
        picked = draws.integers(0, len(OPERATIONS), 4)
        reduction = REDUCTIONS[int(draws.integers(0, len(REDUCTIONS)))]
        specification = Specification(tuple(OPERATIONS[index] for index in picked), reduction)
        if specification.is_checkable():
            longer[specification.text] = specification.task()
    return {"renamed_argument": renamed, "four_operations": list(longer.values())}


def pass_at_1(folder: Path, asked: Sequence[Task]) -> float:
    """Of a model folder, one token per step."""
    model, tokenizer = load_model(folder)
    engine = Engine(model, tokenizer, max_sequences=48, weight_version=WeightVersion("bench", 0, ""))
    with LocalVerifier(2) as verifier:
        (point,) = measure(
            prepared_plainly(asked, tokenizer, 110), [SEQUENTIAL], engine.generate, verifier.verify, tokenizer
        )
    return point.pass_at_1


def ablation(folder: Path, keys: Sequence[str], num_out_of_domain: int) -> dict[str, Any]:
    """One changed run in numbers."""
    report = json.loads((refined(folder, ("seed=0", *keys)) / "report.json").read_text())
    return {
        "keys": list(keys),
        "speedup_forwards": report["speedup_forwards"],
        "speedup_vs_sequential": report["speedup_vs_sequential"],
        "pass_at_1_sequential_after": report["frontier_after"][0]["pass_at_1"],
        "aup_after": report["aup_after"],
        "refine_seconds": report["refine_seconds"],
        "steps": report["steps"],
        "worst_policy": worst_policy(report),
        "out_of_domain": out_of_domain([folder], num_out_of_domain),
    }


def goals(result: dict[str, Any]) -> dict[str, bool]:
    """What was asked for, and whether it was reached."""
    return {
        f"speedup_forwards of at least {GOAL}": result["speedup_forwards_mean"] >= GOAL,
        f"speedup_forwards of {AIM} (aim)": result["speedup_forwards_mean"] >= AIM,
        "refined at or above unrefined at every policy": all(
            one["gain_points"] >= 0.0 for one in result["worst_policy"]
        ),
        f"out of domain down by at most {MAX_DROP_POINTS} points": all(
            one["drop_points_mean"] <= MAX_DROP_POINTS for one in result["out_of_domain"].values()
        ),
        f"at most {MAX_OVERHEAD:.0%} of time outside generation, verification and training": all(
            share <= MAX_OVERHEAD for share in result["per_seed"]["overhead_share"]
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
