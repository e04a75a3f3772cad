"""What tracking costs a refine step: `python bench/tracking_overhead.py`.

The loop of `fewstep refine` with its real replicas, sandbox and trainer, in windows of equal steps: tracked in MLflow (a
sqlite store, traces as sampled by default, spreads, a logged checkpoint a window, system metrics) and not tracked, in turns ABBA. The
learning rate is 1e-12, so every window rolls out the same tasks with the same weights, draws the same numbers and does
the same work. A tracked window lasts until its records are in the store, though in a run the next step hides that.

Writes bench/results/tracking-overhead.json: the median over pairs of (tracked / untracked - 1), with quartiles, and the
processor time of the delivering thread by step, which other work on the machine does not change; and the sentence in
docs/tracking.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from fewstep.actors.replica import ReplicaSettings
from fewstep.actors.replica_pool import ReplicaPool
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.trainer import TrainerGroup
from fewstep.actors.verifier import VerifierPool
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import embedded_model, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.pipelines.exported_models import ExportedModels
from fewstep.pipelines.objectives import OBJECTIVES
from fewstep.pipelines.refine import Progress, Workers, refine
from fewstep.pipelines.refine_job import make_objective
from fewstep.pipelines.rollouts import rollout_policy
from fewstep.pipelines.settings import VERIFIER_CPUS, RefineConfig
from fewstep.pipelines.task_source import TaskSource, open_tasks
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.mlflow_store import sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import WeightVersion
from fewstep.platform.system_metrics import HostSampler, SystemMetrics
from fewstep.platform.tracking import MemoryTracker

RESULTS = Path(__file__).resolve().parent / "results" / "tracking-overhead.json"
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "tracking.md"
GOAL = 0.01


@dataclass
class Bench:
    """The open pools, and what a window needs of them."""

    config: RefineConfig
    workers: Workers
    model: ModelConfig
    source: TaskSource
    folder: Path

    def window(self, tracker: MlflowTracker | MemoryTracker) -> float:
        """Seconds of one window of steps; a tracked one ends when its records are in the store."""
        shutil.rmtree(self.folder / "models", ignore_errors=True)
        tokenizer = load_tokenizer(embedded_model(), self.model)
        exports = ExportedModels(
            self.folder / "models", 2, tracker, self.model, tokenizer, name="bench", example="def f("
        )

        def checkpoint(progress: Progress) -> None:
            policy = rollout_policy(self.config, progress.threshold)
            exports.add(self.workers.trainer.state(), progress.step, policy, progress.history)

        started = time.perf_counter()
        start = Progress(threshold=self.config.curriculum.start)
        refine(
            self.config,
            self.model,
            tokenizer,
            self.source,
            make_objective(self.config),
            self.workers,
            tracker,
            start,
            checkpoint,
        )
        if isinstance(tracker, MlflowTracker) and not tracker.flush():
            raise RuntimeError("the store did not take the records")
        return time.perf_counter() - started


@contextmanager
def opened(steps: int, folder: Path) -> Iterator[Bench]:
    """The pools of the demo's refinement."""
    config = RefineConfig(
        out=folder, steps=steps, checkpoint_every=steps, learning_rate=1e-12, tracking_uri=sqlite_uri(folder)
    )
    source = embedded_model()
    model = ModelConfig.load(source)
    with ExitStack() as stack:
        stack.enter_context(ray_session(num_cpus=2, need={"CPU": config.total_cpus}))
        settings = ReplicaSettings(
            max_sequences=config.max_sequences, num_cpus=config.replica_cpus, dtype="float32"
        )
        pool = stack.enter_context(
            ReplicaPool(source, config.num_replicas, run_id="bench", settings=settings)
        )
        verifiers = stack.enter_context(VerifierPool(config.num_verifiers, num_cpus=VERIFIER_CPUS))
        objective = OBJECTIVES.get(config.objective, config.objective)
        trainer = TrainerGroup(
            model, source, config.trainer, objective, config.objective_options, num_cpus=config.trainer_cpus
        )
        stack.callback(trainer.close)

        def push(state: Mapping[str, torch.Tensor], version: WeightVersion) -> dict[str, float]:
            receipt = pool.push(state, WeightVersion(version.run_id, version.step, state_checksum(state)))
            return {"sync/seconds": receipt.seconds, "sync/bytes": float(receipt.num_bytes)}

        tasks = open_tasks(config, model, load_tokenizer(source, model), ChatTemplate(source), verifiers)
        yield Bench(config, Workers(pool.generate, verifiers.verify, trainer, push), model, tasks, folder)


def courier_seconds() -> float:
    """Processor time that the delivering thread has used."""
    native = next(t.native_id for t in threading.enumerate() if t.name == "fewstep-courier")
    return sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id == native)


def measure(steps: int, pairs: int, folder: Path) -> dict[str, Any]:
    """Windows in turns, after one of each that is not counted."""
    off, on, delivery = [], [], []
    with opened(steps, folder) as bench:
        tracker = MlflowTracker(
            sqlite_uri(folder), experiment="overhead", run_name="overhead", system_metrics=False
        )
        for number in range(-1, pairs):
            for tracked in (True, False) if number % 2 else (False, True):
                if tracked:
                    before = courier_seconds()
                    sampling = SystemMetrics(tracker.log_metrics, HostSampler())
                    seconds = bench.window(tracker)
                    sampling.close()
                    delivery.append((courier_seconds() - before) / steps)
                    on.append(seconds)
                else:
                    seconds = bench.window(MemoryTracker())
                    off.append(seconds)
                print(f"{'tracked  ' if tracked else 'untracked'} {seconds / steps:.3f} s a step", flush=True)
        tracker.finish("FINISHED")
    off, on, delivery = off[1:], on[1:], delivery[1:]
    overheads = [with_it / without - 1.0 for with_it, without in zip(on, off, strict=True)]
    quartiles = statistics.quantiles(overheads, n=4)
    return {
        "value": statistics.median(overheads),
        "unit": "tracked / untracked - 1",
        "goal": f"below {GOAL}",
        "quartiles": [quartiles[0], quartiles[2]],
        "overheads": overheads,
        "step_seconds_untracked": statistics.median(off) / steps,
        "step_seconds_tracked": statistics.median(on) / steps,
        "delivery_cpu_seconds_per_step": statistics.median(delivery),
        "delivery_cpu_share_of_a_step": statistics.median(delivery) * steps / statistics.median(off),
        "settings": {
            "steps_per_window": steps, "pairs": pairs, "store": "sqlite", "traces_per_step": bench.config.traces_per_step,
            "checkpoints_per_window": 1, "prompts_per_step": bench.config.prompts_per_step,
            "group_size": bench.config.group_size, "threads": os.environ["OMP_NUM_THREADS"],
        },
        "machine": machine_info(),
        "commit": git_commit(),
    }  # fmt: skip


def sentence(result: Mapping[str, Any]) -> str:
    """The result in words, for docs/tracking.md."""
    machine, settings = result["machine"], result["settings"]
    low, high = result["quartiles"]
    return (
        f"A step of the demo's refinement takes {result['step_seconds_untracked']:.3f} s untracked and"
        f" {result['step_seconds_tracked']:.3f} s tracked: {100 * result['value']:.2f} % more in the median of"
        f" {settings['pairs']} pairs (quartiles {100 * low:.2f} and {100 * high:.2f} %; goal: below {100 * GOAL:g} %). Its thread uses"
        f" {1000 * result['delivery_cpu_seconds_per_step']:.1f} ms of processor time a step,"
        f" {100 * result['delivery_cpu_share_of_a_step']:.2f} % of it. {machine['cpu']}, {machine['cores']} cores; a checkpoint every"
        f" {settings['steps_per_window']} steps; commit `{result['commit'][:12]}`."
    )


def main() -> int:
    from bench.documents import fill

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="steps of a window")
    parser.add_argument("--pairs", type=int, default=8, help="windows of each kind that count")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fewstep-overhead-") as folder:
        result = measure(arguments.steps, arguments.pairs, Path(folder))
    atomic_write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    if arguments.out == RESULTS:
        fill(DOCS, "overhead", sentence(result))
    print(
        f"tracking costs {100 * result['value']:.2f} % of a step; its thread "
        f"{1000 * result['delivery_cpu_seconds_per_step']:.1f} ms of processor time; wrote {arguments.out}"
    )
    return 0


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.exit(main())
