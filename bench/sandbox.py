"""How fast the sandbox judges, and how late it ends what will not end: `python bench/sandbox.py`, about three minutes.

Verdicts per second of one sandbox and of two at once, in turns, on the embedded family's own solutions (16 calls a
program), each of which must pass. Then the attack corpus of the tests: how many programs, how many were rewarded, and the
seconds by which the slowest outlived its deadline. Writes bench/results/sandbox.json. Run it on a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.chaos.attack_corpus import ATTACKS, CALL, SCRIPT

from fewstep.actors.sandbox.sandbox import Limits, Sandbox
from fewstep.actors.verifier import LocalVerifier
from fewstep.pipelines.tasks.family import tasks
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info

RESULTS = ROOT / "bench" / "results" / "sandbox.json"
TIMEOUT_S = 0.5
GOAL_S = 1.0
NUM_PROGRAMS = 400


def verdicts_per_second(repeats: int) -> dict[str, float]:
    """Medians of one sandbox and of two, measured in turns."""
    answers = [(task, task.canonical_solution) for task in tasks(NUM_PROGRAMS, 0, held_out=True)]
    rates: dict[int, list[float]] = {1: [], 2: []}
    with LocalVerifier(1) as one, LocalVerifier(2) as two:
        for _ in range(repeats):
            for count, verifier in ((1, one), (2, two)):
                started = time.perf_counter()
                verdicts = verifier.verify(answers)
                rates[count].append(len(answers) / (time.perf_counter() - started))
                if not all(verdict.passed for verdict in verdicts):
                    raise RuntimeError("a right program did not pass")
                print(f"{count} sandboxes: {rates[count][-1]:.0f} verdicts/s", flush=True)
    return {f"{count}_sandboxes": statistics.median(own) for count, own in rates.items()}


def attack() -> dict[str, object]:
    """Every program of the corpus under both kinds of check, in the isolation that this host gives."""
    late, outcomes, rewarded = {}, Counter[str](), []
    with Sandbox(Limits(scratch_bytes=8 << 20)) as sandbox:
        for name, program in ATTACKS.items():
            for check in (CALL, SCRIPT):
                started = time.perf_counter()
                verdict = sandbox.run(program, check, TIMEOUT_S)
                late[f"{name}, {check.kind}"] = time.perf_counter() - started - TIMEOUT_S
                outcomes[verdict.outcome] += 1
                if verdict.passed or verdict.score:
                    rewarded.append(name)
        isolation = sandbox.isolation
    slowest = max(late, key=lambda name: late[name])
    return {
        "num_attacks": len(ATTACKS),
        "num_runs": len(late),
        "num_rewarded": len(rewarded),
        "rewarded": rewarded,
        "max_seconds_past_deadline": late[slowest],
        "slowest": slowest,
        "goal": f"none rewarded, none past its deadline by more than {GOAL_S} s",
        "goal_met": not rewarded and late[slowest] <= GOAL_S,
        "outcomes": dict(outcomes),
        "isolation": isolation,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rates = verdicts_per_second(arguments.repeats)
    result = {
        "value": rates["2_sandboxes"],
        "unit": "verdicts per second, two sandboxes",
        "verdicts_per_second": rates,
        "attacks": attack(),
        "settings": {
            "programs": NUM_PROGRAMS, "calls_per_program": 16, "repeats": arguments.repeats, "timeout_s": TIMEOUT_S,
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
        },
        "machine": machine_info(),
        "commit": git_commit(),
    }  # fmt: skip
    atomic_write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps({"value": result["value"], "unit": result["unit"], **attack_summary(result)}, indent=2))
    return 0


def attack_summary(result: dict[str, object]) -> dict[str, object]:
    """The attacks' own line for the terminal."""
    attacks = result["attacks"]
    assert isinstance(attacks, dict)
    return {key: attacks[key] for key in ("num_attacks", "num_rewarded", "max_seconds_past_deadline")}


if __name__ == "__main__":
    sys.exit(main())
