"""`python bench/compile_kernels.py`: what every fused kernel costs on sm_80, sm_90 and sm_100, without a GPU.

Compiles each build (`kernels/ahead_of_time.py`) and prints registers, spills, shared memory and the binary's size; the
same rows go to `bench/results/kernels-aot.json`. Exit code 1 if a build spills or wants more shared memory than there is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

# Read when a kernel's module is imported; an interpreted kernel cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import triton

from fewstep.kernels.ahead_of_time import compile_all
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info

RESULTS = Path(__file__).resolve().parent / "results" / "kernels-aot.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="builds compiled at a time"
    )
    arguments = parser.parse_args()

    print(
        f"{'op':<12} {'build':<34} {'arch':<7} {'warps':>5} {'stages':>6} {'registers':>9} {'spill B':>7} "
        f"{'shared B':>8} {'cubin B':>8}"
    )
    rows, complaints = [], []
    for row in compile_all(num_processes=arguments.processes):
        rows.append(row)
        complaint = row.complaint()
        if complaint:
            complaints.append(f"{row.op} {row.build} {row.arch}: {complaint}")
        print(
            f"{row.op:<12} {row.build:<34} {row.arch:<7} {row.num_warps:>5} {row.num_stages:>6} "
            f"{row.registers:>9} {row.spill_bytes:>7} {row.shared_bytes:>8} {row.cubin_bytes:>8}",
            flush=True,
        )
    report = {
        "commit": git_commit(),
        "machine": machine_info(),
        "triton": triton.__version__,
        "units": {"registers": "a thread", "spill_bytes": "a thread", "shared_bytes": "a block"},
        "rows": [asdict(row) for row in rows],
        "complaints": complaints,
    }
    atomic_write_text(arguments.out, json.dumps(report, indent=1) + "\n")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
