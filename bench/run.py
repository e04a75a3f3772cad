"""`make bench`: how fast the engine denoises and the sandbox judges, on this machine, with one thread.

Writes `bench/results/COMMIT.json`: the machine, the model's checksum and one row per measurement. Every engine row
states tokens per forward beside tokens per second: the first is the model's and the policy's, the second the
machine's too. A measurement is repeated and the fastest run counts, because other work on the machine can only
slow it down; verdicts are checked, so a fast wrong answer is an error and not a record.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.sandbox.sandbox import Sandbox
from fewstep.kernels.model.checkpoint import load_model, state_checksum
from fewstep.pipelines.models import model_folder
from fewstep.pipelines.tasks.family import tasks
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.records import DecodePolicy, Task, WeightVersion

RESULTS = Path(__file__).resolve().parent / "results"
REPEATS = 3
BATCH_SIZES = (1, 8, 32)
POLICIES = (
    DecodePolicy(kind="static", tokens_per_step=1),
    DecodePolicy(threshold=0.9),
    DecodePolicy(threshold=0.5),
)


@dataclass(frozen=True)
class EngineRow:
    """One policy at one batch size; tokens are committed ones, forwards are the engine's (shared by the batch)."""

    policy: str
    batch_size: int
    num_requests: int
    tokens_per_second: float
    forwards_per_second: float
    tokens_per_forward: float
    forwards_per_answer: float


@dataclass(frozen=True)
class SandboxRow:
    """Verdicts on the tasks' own solutions, one after another."""

    num_programs: int
    verdicts_per_second: float
    isolation: str


def fastest(measure: Callable[[], float]) -> float:
    """Seconds of the fastest of a few runs."""
    return min(measure() for _ in range(REPEATS))


def measure_engine(
    engine: Engine, batch_size: int, asked: Sequence[Task], policy: DecodePolicy, max_tokens: int
) -> EngineRow:
    """Requests of one policy; the engine has `batch_size` slots, so that many share a forward."""
    requests = [
        Request(task.task_id, tuple(engine.tokenizer.encode(task.prompt).ids), policy, max_tokens=max_tokens)
        for task in asked
    ]
    tokens = forwards = answers = 0

    def once() -> float:
        nonlocal tokens, forwards, answers
        before, started = engine.forwards, time.perf_counter()
        done = engine.generate(requests)
        seconds = time.perf_counter() - started
        tokens = sum(trajectory.num_tokens for trajectory in done)
        answers = sum(trajectory.forwards for trajectory in done)
        forwards = engine.forwards - before
        return seconds

    seconds = fastest(once)
    return EngineRow(
        policy=policy.label(),
        batch_size=batch_size,
        num_requests=len(requests),
        tokens_per_second=tokens / seconds,
        forwards_per_second=forwards / seconds,
        tokens_per_forward=tokens / answers,
        forwards_per_answer=answers / len(requests),
    )


def measure_sandbox(asked: Sequence[Task]) -> SandboxRow:
    """The canonical solutions through one sandbox; each must pass."""
    jobs = [(task.prompt + task.canonical_solution, task.check, task.timeout_s) for task in asked]
    sandbox = Sandbox()

    def once() -> float:
        started = time.perf_counter()
        verdicts = sandbox.run_many(jobs)
        seconds = time.perf_counter() - started
        failed = [verdict for verdict in verdicts if not verdict.passed]
        if failed:
            raise RuntimeError(f"{len(failed)} right answers were refused, the first as {failed[0]}")
        return seconds

    try:
        return SandboxRow(len(jobs), len(jobs) / fastest(once), sandbox.isolation)
    finally:
        sandbox.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="", help="model folder; default: the embedded model")
    parser.add_argument("--num-tasks", type=int, default=64, help="held-out tasks asked of each policy")
    parser.add_argument("--max-tokens", type=int, default=80, help="tokens of an answer at most")
    parser.add_argument("--out", type=Path, help="result file; default: bench/results/COMMIT.json")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    folder = model_folder(arguments.model, "")
    asked = tasks(arguments.num_tasks, seed=0, held_out=True)
    engine_rows = []
    print(
        f"{'policy':<16} {'batch':>5} {'tokens/s':>9} {'forwards/s':>10} {'TPF':>6} {'forwards/answer':>15}"
    )
    for batch_size in BATCH_SIZES:
        model, tokenizer = load_model(folder)
        version = WeightVersion("bench", 0, state_checksum(model.state_dict()))
        engine = Engine(model, tokenizer, max_sequences=batch_size, weight_version=version)
        for policy in POLICIES:
            row = measure_engine(engine, batch_size, asked, policy, arguments.max_tokens)
            engine_rows.append(row)
            print(
                f"{row.policy:<16} {row.batch_size:>5} {row.tokens_per_second:>9.1f} "
                f"{row.forwards_per_second:>10.1f} {row.tokens_per_forward:>6.2f} {row.forwards_per_answer:>15.2f}"
            )
    sandbox_row = measure_sandbox(asked)
    print(f"sandbox: {sandbox_row.verdicts_per_second:.0f} verdicts/s ({sandbox_row.isolation})")
    commit = git_commit()
    report = {
        "commit": commit,
        "machine": machine_info(),
        "model_checksum": version.checksum,
        "engine": [asdict(row) for row in engine_rows],
        "sandbox": asdict(sandbox_row),
    }
    path = arguments.out or RESULTS / f"{commit[:12]}.json"
    atomic_write_text(path, json.dumps(report, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
