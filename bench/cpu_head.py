"""`python bench/cpu_head.py`: the head's and the loss's implementations side by side on this CPU, one thread.

Eager torch with whole logits, the chunked reference and the tiled head; eager torch and the chunked loss, forward and
backward. Implementations take turns and the median of the process's own time counts: with one thread it is the wall time of
an idle machine, and other work adds less to it. One that disagrees with eager torch is an error and not a time. Prints a
table and writes `bench/results/cpu-head.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Case, Inputs, Outputs
from cases_head import head_case, loss_case

from fewstep.kernels.head import tiled
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-head.json"
BF16, FP32 = torch.bfloat16, torch.float32

# (case, its type, the implementations beside eager torch)
CASES: list[tuple[Case, torch.dtype, tuple[str, ...]]] = [
    *(
        (head_case(rows, vocabulary, width, draw, dtype), dtype, ("reference", "tiled"))
        for rows, vocabulary, width, draw, dtype in (
            (8, 32_768, 1024, False, BF16),
            (32, 8_192, 1024, False, BF16),
            (32, 32_768, 1024, False, BF16),
            (128, 32_768, 1024, False, BF16),
            (256, 32_768, 1024, False, BF16),
            (32, 126_464, 1024, False, BF16),
            (256, 126_464, 1024, False, BF16),
            (32, 32_768, 1024, True, BF16),
            (256, 32_768, 1024, True, BF16),
            (32, 49_152, 576, False, FP32),
            (256, 49_152, 576, False, FP32),
        )
    ),
    *(
        (loss_case(rows, vocabulary, 512, dtype), dtype, ("chunked",))
        for rows, vocabulary, dtype in ((1024, 4_096, BF16), (256, 32_768, BF16), (1024, 4_096, FP32))
    ),
]


def measure(case: Case, names: tuple[str, ...], repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time of eager torch and of each implementation.

    Errors: RuntimeError for an implementation that gives something else than eager torch.
    """
    inputs = case.make(torch.device("cpu"), 0)
    calls: dict[str, Callable[[Inputs], Outputs]] = {"eager": case.rival}
    calls |= {name: lambda one, name=name: case.run(one, name) for name in names}
    expected = case.rival(inputs)
    for name in names:
        if complaint := case.complaint(calls[name](inputs), expected):
            raise RuntimeError(f"{case.op}, {case.name}, {name}: {complaint}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.process_time()
            call(inputs)
            seconds[name].append(time.process_time() - started)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each implementation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    rows = []
    for case, dtype, names in CASES:
        times = measure(case, names, arguments.repeats)
        settings = {**case.settings, "dtype": str(dtype).removeprefix("torch.")}
        rows += [
            {
                "op": case.op,
                "implementation": name,
                "value": round(value, 3),
                "unit": "ms",
                "speedup": round(times["eager"] / value, 3),
                "settings": settings,
            }
            for name, value in times.items()
        ]
        what = " ".join(f"{name}={value}" for name, value in settings.items())
        listed = "  ".join(
            f"{name} {value:.1f} ms ({times['eager'] / value:.2f}x)" for name, value in times.items()
        )
        print(f"{case.op} {what}: {listed}", flush=True)
    report = {
        "commit": git_commit(),
        "machine": machine_info(),
        "threads": 1,
        "repeats": arguments.repeats,
        "statistic": "median of processor time; implementations in turn",
        "tile": tiled.TILE,
        "rows": rows,
    }
    atomic_write_text(arguments.out, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
