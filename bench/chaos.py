"""kill -9 at drawn places of a small refinement: `python bench/chaos.py --seeds 20` -> bench/results/chaos.json.

Each seed draws a victim (replica, verifier, trainer rank, driver) and a place (tests/chaos/killed_refine.py). The job
must end by itself, or say what died and end when the same command is given again, with the data order and the weights of
an undisturbed run, a truthful MLflow status and no process or folder left. About a minute a seed on two quiet cores.
Seeds that are done at this commit are kept in runs/chaos and not repeated, so an interrupted measurement goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "chaos.json"
RUNS = ROOT / "runs" / "chaos"
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from tests.chaos.killed_refine import JOB, STEPS, Result, drawn, run_refine, tracked

from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info

if TYPE_CHECKING:
    from tests.chaos.killed_refine import Ended, Kill

Row = dict[str, Any]
TRUE_STATUS = {"driver": "KILLED", "trainer": "FAILED"}
"""What MLflow must say of a run whose job did not outlive the victim."""


def undisturbed(fresh: bool) -> Result:
    """What the job comes to when nothing happens to it."""
    out = RUNS / "undisturbed" / "job"
    if fresh or not (out / "report.json").is_file():
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir(parents=True)
        ended = run_refine(out)
        if ended.code or ended.left:
            raise SystemExit(f"the undisturbed run: code {ended.code}, left {ended.left}: {ended.lines[-1]}")
    return Result.of(out)


def measure(seed: int, expected: Result) -> Row:
    """One killed job, gone on with where it did not end by itself."""
    kill, out = drawn(seed), RUNS / f"seed-{seed:03d}" / "job"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir(parents=True)
    started, row = time.monotonic(), {"seed": seed, **asdict(kill)}
    try:
        row |= _outcome(out, kill, expected)
    except TimeoutError as error:
        row |= {"outcome": "hung", "good": False, "last_words": str(error)[-600:]}
    row["seconds"] = round(time.monotonic() - started, 1)
    if row["good"]:
        shutil.rmtree(out.parent)
    return row


def _outcome(out: Path, kill: Kill, expected: Result) -> Row:
    ended: list[Ended] = [run_refine(out, kill)]
    status_after_kill = tracked(out)["status"]
    if ended[0].code:
        ended.append(run_refine(out))
    outcome = "failed" if ended[-1].code else "resumed" if len(ended) > 1 else "ended"
    record, orphans = tracked(out), [name for one in ended for name in one.left]
    row: Row = {
        "killed": ended[0].killed,
        "outcome": outcome,
        "mlflow_status_after_kill": status_after_kill,
        "mlflow_status": record["status"],
        "orphans": orphans,
        "errors": ended[0].errors,
    }
    if outcome == "failed":
        return row | {"same_data_order": False, "same_weights": False, "good": False}
    result = Result.of(out)
    row["same_data_order"] = (result.order, result.answers) == (expected.order, expected.answers)
    row["same_weights"] = result.weights == expected.weights
    told = [TRUE_STATUS.get(kill.victim, "") if len(ended) > 1 else "FINISHED"]
    true = [status_after_kill] == told and set(record["earlier"]) <= set(told)
    row["mlflow_true"] = true and record["status"] == "FINISHED" and record["steps"] == [*range(1, STEPS + 1)]
    good = row["same_data_order"] and row["same_weights"] and row["mlflow_true"] and row["killed"]
    return row | {"good": bool(good and not orphans)}


def summary(rows: Sequence[Row]) -> Row:
    """What all seeds come to."""
    return {
        "name": "chaos",
        "value": sum(row["good"] for row in rows),
        "unit": f"of {len(rows)} killed refinements with the data, weights and record of an undisturbed one",
        "victims": dict(Counter(row["victim"] for row in rows)),
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "seeds": list(rows),
        "settings": {"job": list(JOB)},
        "machine": machine_info(),
        "commit": git_commit(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--fresh", action="store_true", help="repeat what is done")
    arguments = parser.parse_args()
    kept, stamp = RUNS / "rows.json", f"{git_commit()} {' '.join(JOB)}"
    saved = json.loads(kept.read_text()) if kept.is_file() and not arguments.fresh else {}
    fresh = saved.get("stamp") != stamp
    rows: dict[str, Row] = {} if fresh else saved["rows"]
    expected = undisturbed(fresh)
    atomic_write_text(kept, json.dumps({"stamp": stamp, "rows": rows}))
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    for number, seed in enumerate(seeds, 1):
        if str(seed) not in rows:
            rows[str(seed)] = measure(seed, expected)
            atomic_write_text(kept, json.dumps({"stamp": stamp, "rows": rows}))
        row = rows[str(seed)]
        print(
            f"{number:>3}/{len(seeds)}  seed {seed}: {row['victim']} after step {row['step']} + {row['delay_s']:.2f} s:"
            f" {row['outcome']}, {'as undisturbed' if row['good'] else 'WRONG: ' + json.dumps(row)}  {row['seconds']} s",
            flush=True,
        )
    result = summary([rows[str(seed)] for seed in seeds])
    atomic_write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    print(f"{result['value']} {result['unit']}; wrote {arguments.out}")
    return 0 if result["value"] == len(seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
