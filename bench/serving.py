"""How serving holds up on this machine: `python bench/serving.py [PART ...]`, into bench/results/serving-cpu.json.

    http_ratio   committed tokens a second through HTTP over those of the engine in process, 16 clients
    soak         64 clients for ten minutes, three in ten leave early: memory, 5xx, what does not end
    fuzz         10,000 requests that nobody should send: 5xx, pages and slots left in use
    recovery     kill -9 of a replica under load: until everything accepted has ended
    dlmserve     beside dlmserve over HTTP on equal weights; needs --peers (docs/benchmarks.md sets them up)

Each part replaces its own entry and leaves the others, so they can be run one at a time, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "serving-cpu.json"
DOCS = ROOT / "docs" / "operations.md"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").split("\n\n")[1],
    )  # fmt: skip
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; default: all but dlmserve")
    parser.add_argument("--requests", type=int, default=400, help="http_ratio: requests of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="http_ratio: rounds, medians of which count")
    parser.add_argument("--minutes", type=float, default=10.0, help="soak: how long")
    parser.add_argument("--clients", type=int, default=64, help="soak: clients at a time")
    parser.add_argument("--fuzz-requests", type=int, default=10_000, help="fuzz: requests")
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="recovery: of load; dlmserve: of each rate"
    )
    parser.add_argument("--peers", type=Path, help="dlmserve: the folder with venv-4")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    parts = _parts(arguments)
    wanted = arguments.parts or [name for name in parts if name != "dlmserve"]
    for name in wanted:
        if name not in parts:
            parser.error(f"no part {name!r}; parts: {', '.join(parts)}")
    for name in wanted:
        print(f"{name} ...", file=sys.stderr, flush=True)
        result = parts[name]()
        _record(arguments.out, name, result)
        print(json.dumps({name: result}, indent=2))
    return 0


def _parts(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    from bench.serving_parts import fuzz, peer, ratio, recovery, soak

    return {
        "http_ratio": lambda: ratio.measure(16, arguments.requests, arguments.rounds),
        "soak": lambda: soak.measure(arguments.minutes, arguments.clients),
        "fuzz": lambda: fuzz.measure(arguments.fuzz_requests),
        "recovery": lambda: recovery.measure(arguments.seconds),
        "dlmserve": lambda: peer.measure(arguments.peers, arguments.seconds),
    }


def _record(path: Path, name: str, result: dict[str, Any]) -> None:
    """Put one part's result into the file. The headline numbers also stand at its top."""
    from bench.documents import fill
    from bench.serving_parts.tables import tables

    from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info

    kept = json.loads(path.read_text()) if path.is_file() else {}
    load = dict(zip(("1_min", "5_min", "15_min"), os.getloadavg(), strict=True))
    kept.setdefault("parts", {})[name] = {
        **result, "machine": machine_info(), "commit": git_commit(), "load_average_at_end": load,
    }  # fmt: skip
    headlines = {"http_ratio": "http_ratio", "recovery": "recovery_s"}
    if name in headlines:
        kept[headlines[name]] = result[headlines[name]]
    shown = {
        "soak": ("minutes", "clients", "rss_slope_bytes_per_min", "errors_5xx"),
        "fuzz": ("requests", "errors_5xx", "leaked_pages"),
        "dlmserve": ("rows",),
    }
    if name in shown:
        kept[name] = {key: result[key] for key in shown[name]}
    atomic_write_text(path, json.dumps(kept, indent=2) + "\n")
    if path == RESULTS:
        fill(DOCS, "serving-cpu", tables(kept["parts"]))


if __name__ == "__main__":
    # One thread a process, as `make` sets it: replicas and clients share few cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[0] = str(ROOT)
    sys.exit(main())
