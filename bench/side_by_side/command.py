"""`python bench/peers.py`: arguments, progress, and the files that are written."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.documents import fill
from bench.side_by_side import report, table
from bench.side_by_side.plan import Peer, chosen_peers, comparisons, missing
from bench.side_by_side.settings import QUICK, Settings
from bench.side_by_side.store import Store

from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.config import load_config
from fewstep.platform.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench" / "results" / "peers-cpu.json"
DEMO = ROOT / "bench" / "results" / "demo.json"
PAGE = ROOT / "docs" / "benchmarks.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/peers.py",
        description="Run our engine and its peers on the same weights and prompts, in turn, on this CPU. How to set the "
        "peers up: docs/benchmarks.md.",
    )
    parser.add_argument(
        "settings", nargs="*", help="key=value, such as tokens_per_step=8 or model.vocab_size=126464"
    )
    parser.add_argument("--peers", type=Path, help="folder of the peers' checkouts and environments")
    parser.add_argument("--only", nargs="+", default=[], metavar="PEER", help="these peers alone")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, to see that every peer runs; no result is kept"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what a run with these settings has finished"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "peers", help="models, logs and finished comparisons"
    )
    parser.add_argument("--out", type=Path, help=f"result file; default: {RESULT.relative_to(ROOT)}")
    parser.add_argument(
        "--table", action="store_true", help="measure nothing; write the tables of the docs from the result"
    )
    given = parser.parse_intermixed_args(arguments)
    try:
        if given.table:
            fill(PAGE, table.MARKS, table.section(table.read_result(given.out or RESULT)))
            return 0
        if given.peers is None:
            raise ConfigError("--peers", "nothing", "a folder", "name the folder of the peers' checkouts")
        settings = load_config(Settings, None, [*(QUICK if given.quick else ()), *given.settings])
        work = given.work / "quick" if given.quick else given.work
        out = given.out or (work / "result.json" if given.quick else RESULT)
        run(settings, chosen_peers(given.only), given.peers, work, given.resume, out)
        if out == RESULT:
            fill(PAGE, table.MARKS, table.section(table.read_result(out)))
    except UserError as error:
        print(f"peers: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("peers: stopped; --resume goes on from here", file=sys.stderr)
        return 130
    return 0


def run(settings: Settings, peers: Sequence[Peer], folder: Path, work: Path, resume: bool, out: Path) -> None:
    """Measure what can be measured and write the result; peers that are not there are listed with the reason."""
    # Late: torch takes seconds to import, and a wrong argument should not.
    from bench.side_by_side import measure
    from bench.side_by_side.weights import write_models

    started = time.monotonic()
    reasons = {peer.name: reason for peer in peers if (reason := missing(peer, folder))}
    for name, reason in reasons.items():
        print(f"not run: {name}: {reason}", flush=True)
    plan = comparisons([peer for peer in peers if peer.name not in reasons], settings)
    if not plan:
        raise ConfigError("--peers", folder, "a folder with at least one peer", "see docs/benchmarks.md")
    commit = git_commit()
    store = Store(work / "finished.jsonl", f"{settings.digest()} {commit}", resume)

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    say("writing the weights")
    models = work / f"models-{settings.model.digest(settings.seed)}"
    write_models(models, settings.model, settings.seed)
    machinery = measure.Machinery(settings, folder.resolve(), models, work / "logs", say)
    measure.run(machinery, plan, store)
    result: dict[str, Any] = {
        "rows": report.rows_of(plan, store, settings),
        "loops": report.loops_of(plan, store),
        "autoregressive": report.autoregressive_of(plan, store, report.embedded_tpf(DEMO)),
        "not_run": [{"peer": name, "reason": reason} for name, reason in reasons.items()]
        + report.failures_of(plan, store),
        "settings": settings.model_dump(mode="json"),
        "parameters": parameters(settings),
        "versions": machinery.versions,
        "machine": machine_info(),
        "commit": commit,
        "total_seconds": time.monotonic() - started,
    }
    atomic_write_text(out, json.dumps(result, indent=2) + "\n")
    say(f"wrote {out}")


def parameters(settings: Settings) -> dict[str, dict[str, int]]:
    """Of the two networks, with and without embedding and head."""
    return {
        name: {
            "layers": settings.model.num_layer_parameters(grouped),
            "all": settings.model.num_parameters(grouped),
        }
        for name, grouped in (("llada", False), ("sdar", True))
    }
