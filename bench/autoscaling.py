"""A burst served by scaling on requests, and on work left: `python bench/autoscaling.py` -> bench/results/autoscaling.json
and the table in docs/operations.md.

Simulated (`fewstep.cluster.plan.scaling_model`): the same arrivals, the same delays of scaling and starting, and each signal
at several targets, since a low target buys short waits with replicas. A request's wait ends when it has a slot.
The first burst is of many short answers, the second of as many requests with long ones among them: the same count, and
several times the work. Medians over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
from bench.documents import fill

from fewstep.cluster.plan.answers import AnswerSource, MixedAnswers, ProfiledAnswers
from fewstep.cluster.plan.devices import DEVICES
from fewstep.cluster.plan.fleet_model import FleetSpec
from fewstep.cluster.plan.scaling_model import ScaledFleet, Scaling, Signal, burst
from fewstep.cluster.plan.settings import PlanConfig, Workload
from fewstep.cluster.plan.sizing import num_pages
from fewstep.cluster.plan.step_cost import Roofline
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operations.md"
RESULT = Path(__file__).resolve().parent / "results" / "autoscaling.json"
DEVICE = DEVICES["h100"]
SLOTS = 16
MOST = 12
CALM, HIGH = 15.0, 90.0  # requests a second
PHASES = ((CALM, 30.0), (HIGH, 45.0), (CALM, 60.0))
SHORT, LONG = 32, 384  # tokens of an answer, in the mean
LONG_SHARES = {"short answers": 0.0, "long answers among them": 0.4}
# Requests a replica: half its slots, all of them, twice as many. Seconds of work: of a full batch.
TARGETS: dict[Signal, tuple[float, ...]] = {"requests": (8.0, 16.0, 32.0), "work": (0.25, 0.5, 1.0, 2.0)}


def answers(long_share: float) -> AnswerSource:
    profile = PlanConfig().profiles[0]
    kinds = [
        ProfiledAnswers(Workload(prompt_tokens=256, answer_tokens=tokens), profile)
        for tokens in (SHORT, LONG)
    ]
    return MixedAnswers(kinds, (1.0 - long_share, long_share))


def measure(kind: str, scaling: Scaling, seed: int) -> dict[str, Any]:
    """One run to its last answer."""
    config = PlanConfig()
    pages = num_pages(config, DEVICE, config.profiles[0].block_size)
    spec = FleetSpec(Roofline(DEVICE, config.model, config.fleet), MOST, SLOTS, pages)
    fleet = ScaledFleet(spec, scaling, seed)
    jobs = burst(answers(LONG_SHARES[kind]), PHASES, seed)
    run = fleet.simulate(jobs)
    assert len(run.latencies_s) == len(jobs)
    return {
        "load": kind, "signal": scaling.signal, "target": scaling.target, "seed": seed, "requests": len(jobs),
        "wait_p50_s": run.wait_s(50), "wait_p95_s": run.wait_s(95),
        "latency_p50_s": run.latency_s(50), "latency_p95_s": run.latency_s(95),
        "replica_seconds": fleet.scaled.replica_seconds, "most_replicas": fleet.scaled.most_replicas,
    }  # fmt: skip


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The middle of each figure over runs that differ in their seed."""
    first = runs[0]
    named = {key: first[key] for key in ("load", "signal", "target")}
    figures = [key for key in first if key not in (*named, "seed")]
    return named | {key: statistics.median(run[key] for run in runs) for key in figures}


def table(rows: list[dict[str, Any]]) -> str:
    """For docs/operations.md."""
    lines = [
        "| burst | signal | target | wait p50, s | p95, s | answer p95, s | replica-seconds | most |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        unit = "s" if row["signal"] == "work" else "requests"
        lines.append(
            f"| {row['load']} | {row['signal']} | {row['target']:g} {unit} | {row['wait_p50_s']:.2f} | {row['wait_p95_s']:.2f} | "
            f"{row['latency_p95_s']:.2f} | {row['replica_seconds']:,.0f} | {row['most_replicas']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    rows = []
    for kind in LONG_SHARES:
        for signal, targets in TARGETS.items():
            for target in targets:
                scaling = Scaling(signal, target)
                rows.append(median([measure(kind, scaling, seed) for seed in range(asked.seeds)]))
                print(json.dumps(rows[-1]), flush=True)
    settings = {
        "device": DEVICE.name, "model": PlanConfig().model.name, "slots": SLOTS, "most_replicas": MOST,
        "phases": [{"requests_per_s": rate, "seconds": seconds} for rate, seconds in PHASES],
        "answer_tokens": [SHORT, LONG], "long_shares": LONG_SHARES, "scaling": {key: value for key, value in asdict(Scaling("work", 0.0)).items() if key not in ("signal", "target")}, "seeds": asked.seeds,
    }  # fmt: skip
    result = {
        "unit": "simulated seconds", "settings": settings, "rows": rows,
        "machine": machine_info(), "commit": git_commit(),
    }  # fmt: skip
    atomic_write_text(asked.out, json.dumps(result, indent=2) + "\n")
    if asked.out == RESULT:
        fill(PAGE, "autoscaling", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
