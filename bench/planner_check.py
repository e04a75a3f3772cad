"""Does `fewstep plan` predict the real engine? `python bench/planner_check.py` -> bench/results/planner-check.json.

Calibration: closed loops at a few concurrencies give the seconds of a few hundred steps; the planner's engine, replaying the
same answers, says what each of those steps carried; a linear price is fitted. Nothing else is taken from the real engine
but how many forwards blocks take, on tasks that the check does not ask.

Check: other tasks, in open loops at loads, and in mixes of policies and batch sizes, that calibration did not see. The
planner is given the arrival times and nothing of the outcome. Errors are relative, the worst of all loads.

Calibration and checks take turns, and each check is priced at the speed that the closed loops right before and after it
had: a machine that others use slows both. One thread; `--clock cpu` counts this process's seconds alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])
from bench.planner_load import EngineClock, answer_of, closed_loop, open_loop, replay

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.cluster.plan.answers import Answer, MeasuredAnswers, MixedAnswers
from fewstep.cluster.plan.fleet_model import FleetModel, FleetRun, FleetSpec, burst_jobs
from fewstep.cluster.plan.replica_model import Job
from fewstep.cluster.plan.step_cost import Fitted, StepLoad, fit
from fewstep.kernels.model.checkpoint import load_model, state_checksum
from fewstep.pipelines.models import model_folder
from fewstep.pipelines.tasks.family import tasks
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.records import DecodePolicy, Task, WeightVersion
from fewstep.platform.rng import generator

RESULT = Path(__file__).resolve().parent / "results" / "planner-check.json"
GOAL = 0.15
MAX_TOKENS = 80
SLOTS = 32
PAGES = 4096  # as the engine is given: no request ever waits for one here
CALIBRATION_CONCURRENCIES = (1, 2, 5, 12, 32)
CALIBRATION_POLICY = DecodePolicy(threshold=0.9)
DRAWS = 9
PROFILE_SEED = 7
_PRICES = (
    "step",
    "row",
    "head_row",
    "sequence",
    "cached_position",
    "pair",
    "group",
    "new_layout",
    "newcomer",
)
POLICIES = {
    "threshold_0.9": DecodePolicy(threshold=0.9),
    "threshold_0.6": DecodePolicy(threshold=0.6),
    "static_1": DecodePolicy(kind="static", tokens_per_step=1),
}


@dataclass(frozen=True)
class Scenario:
    """An open loop: shares of the policies, and the load as a share of what the planner thinks the engine can do."""

    name: str
    mix: dict[str, float]
    load: float


SCENARIOS = (
    Scenario("light", {"threshold_0.9": 1.0}, 0.3),
    Scenario("medium", {"threshold_0.9": 0.5, "threshold_0.6": 0.5}, 0.55),
    Scenario("busy", {"threshold_0.6": 1.0}, 0.75),
    Scenario("busy, mixed", {"threshold_0.9": 0.6, "static_1": 0.4}, 0.75),
    Scenario("overload", {"threshold_0.9": 0.3, "threshold_0.6": 0.3, "static_1": 0.4}, 1.5),
)


class Calibration:
    """Measured steps and answers of the training side, and the price fitted to them."""

    def __init__(self, engine: Engine, clock: Literal["wall", "cpu"]) -> None:
        self.engine, self.clock = engine, clock
        self.loads: list[StepLoad] = []
        self.seconds: list[float] = []
        self._ends: list[int] = []
        self.answers: dict[str, list[Answer]] = {name: [] for name in POLICIES}

    @property
    def _rounds(self) -> int:
        return len(self._ends)

    def measure(self, num_answers: int) -> None:
        """One more closed loop at every concurrency."""
        for concurrency in CALIBRATION_CONCURRENCIES:
            count = 2 * concurrency + 4
            asked = tasks(count, seed=1000 + self._rounds, held_out=False)
            trajectories, seconds = closed_loop(
                self.engine,
                _requests(self.engine, asked, [CALIBRATION_POLICY] * count),
                concurrency,
                EngineClock(self.clock),
            )
            answers = [answer_of(trajectory, self.engine.config.block_size) for trajectory in trajectories]
            loads = replay(answers, concurrency, PAGES)
            if len(loads) != len(seconds):
                raise RuntimeError(f"the engine took {len(seconds)} steps, the planner's engine {len(loads)}")
            self.loads += loads
            self.seconds += seconds
        if not self._rounds:
            for name, policy in POLICIES.items():
                asked = tasks(num_answers, seed=PROFILE_SEED, held_out=True)
                requests = _requests(self.engine, asked, [policy] * num_answers)
                done, _ = closed_loop(self.engine, requests, SLOTS, EngineClock(self.clock))
                self.answers[name] = [answer_of(item, self.engine.config.block_size) for item in done]
        self._ends.append(len(self.loads))

    def price(self, before: int | None = None) -> Fitted:
        """Of all rounds; with `before`, at the speed that round and the one behind it had."""
        price = fit(self.loads, self.seconds)
        if before is None:
            return price
        chosen = range(self._ends[before - 1] if before else 0, self._ends[before + 1])
        priced = sum(price.step_s(self.loads[index]) for index in chosen)
        return price.scaled(sum(self.seconds[index] for index in chosen) / priced)

    def source(self, mix: dict[str, float]) -> MixedAnswers:
        return MixedAnswers([MeasuredAnswers(self.answers[name]) for name in mix], list(mix.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-requests", type=int, default=400, help="of each open loop")
    parser.add_argument(
        "--clock", choices=("cpu", "wall"), default="cpu", help="cpu: this process's seconds alone"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = check(arguments.num_requests, arguments.clock)
    atomic_write_text(arguments.out, json.dumps(report, indent=2) + "\n")
    print(
        f"throughput_error {report['throughput_error']:.3f}, p95_error {report['p95_error']:.3f}, goal {GOAL}"
    )
    return 0 if max(report["throughput_error"], report["p95_error"]) < GOAL else 1


def check(num_requests: int, clock: Literal["wall", "cpu"]) -> dict[str, Any]:
    """The report."""
    model, tokenizer = load_model(model_folder("", ""))
    version = WeightVersion("bench", 0, state_checksum(model.state_dict()))
    engine = Engine(model, tokenizer, max_sequences=SLOTS, weight_version=version, prefix_cache=False)
    warm_up = _requests(engine, tasks(SLOTS, seed=3, held_out=False), [CALIBRATION_POLICY] * SLOTS)
    closed_loop(engine, warm_up, SLOTS, EngineClock(clock))
    calibration = Calibration(engine, clock)
    calibration.measure(num_requests // 2)
    profiled = {task.task_id for task in tasks(num_requests // 2, seed=PROFILE_SEED, held_out=True)}
    measured = []
    for index, scenario in enumerate(SCENARIOS):
        arrivals, policies = _arrivals(calibration, scenario, num_requests, index)
        asked = [
            task
            for task in tasks(num_requests + len(profiled), seed=20 + index, held_out=True)
            if task.task_id not in profiled
        ][:num_requests]
        requests = _requests(engine, asked, policies)
        measured.append((scenario, arrivals, open_loop(engine, requests, arrivals, EngineClock(clock))))
        calibration.measure(0)
    rows = []
    for index, (scenario, arrivals, real) in enumerate(measured):
        price = calibration.price(index)
        runs = [_predict(price, calibration.source(scenario.mix), arrivals, draw) for draw in range(DRAWS)]
        throughput = statistics.median(run.tokens_per_s for run in runs)
        p95 = statistics.median(run.latency_s(95) for run in runs)
        real_p95 = float(torch.tensor(real.latencies_s, dtype=torch.float64).quantile(0.95))
        rows.append(
            {
                "scenario": asdict(scenario),
                "requests_per_s": len(arrivals) / arrivals[-1],
                "tokens_per_s": real.tokens_per_s,
                "predicted_tokens_per_s": throughput,
                "throughput_error": abs(throughput / real.tokens_per_s - 1.0),
                "p95_s": real_p95,
                "predicted_p95_s": p95,
                "p95_error": abs(p95 / real_p95 - 1.0),
                "forwards": real.forwards,
                "predicted_forwards": statistics.median(run.forwards for run in runs),
            }
        )
        print(
            f"{scenario.name:<12} tokens/s {real.tokens_per_s:8.0f} predicted {throughput:8.0f}   "
            f"p95 {real_p95:.4f} s predicted {p95:.4f} s",
            file=sys.stderr,
        )
    return {
        "throughput_error": max(row["throughput_error"] for row in rows),
        "p95_error": max(row["p95_error"] for row in rows),
        "goal": GOAL,
        "unit": "relative error, the worst scenario",
        "scenarios": rows,
        "calibration": {
            "concurrencies": CALIBRATION_CONCURRENCIES,
            "policy": CALIBRATION_POLICY.label(),
            "num_steps": len(calibration.loads),
            "seconds_each": dict(zip(_PRICES, calibration.price().coefficients, strict=True)),
        },
        "settings": {
            "max_sequences": SLOTS,
            "max_tokens": MAX_TOKENS,
            "num_requests": num_requests,
            "threads": 1,
            "clock": clock,
        },
        "machine": machine_info(),
        "commit": git_commit(),
    }


def _requests(engine: Engine, asked: Sequence[Task], policies: Sequence[DecodePolicy]) -> list[Request]:
    return [
        Request(task.task_id, tuple(engine.tokenizer.encode(task.prompt).ids), policy, max_tokens=MAX_TOKENS)
        for task, policy in zip(asked, policies, strict=True)
    ]


def _arrivals(
    calibration: Calibration, scenario: Scenario, count: int, index: int
) -> tuple[list[float], list[DecodePolicy]]:
    """Random arrival times at the scenario's share of the predicted capacity, and each request's policy."""
    source = calibration.source(scenario.mix)
    spec = FleetSpec(calibration.price(), 1, SLOTS, PAGES)
    full = FleetModel(spec).simulate(burst_jobs(source, 8 * SLOTS, index))
    answers_per_s = scenario.load * full.steady_tokens_per_s() / (full.tokens / len(full.latencies_s))
    random = generator(index, "open loop")
    times = random.exponential(1.0 / answers_per_s, size=count).cumsum()
    names = random.choice(list(scenario.mix), size=count, p=list(scenario.mix.values()))
    return [float(time) for time in times], [POLICIES[str(name)] for name in names]


def _predict(price: Fitted, source: MixedAnswers, arrivals: Sequence[float], draw: int) -> FleetRun:
    random = generator(draw, "answers")
    jobs = [Job(at, source.draw(random)) for at in arrivals]
    return FleetModel(FleetSpec(price, 1, SLOTS, PAGES)).simulate(jobs)


if __name__ == "__main__":
    sys.exit(main())
