"""`fewstep pretrain`: the two-stage curriculum, from scratch or from a given model, on the family or on a corpus.

Step s of a run is a pure function of (configuration, data, seed, s) and of the weights before it, so an interrupted
run that resumes at a checkpoint ends where an uninterrupted one does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from fewstep.actors.trainer import TrainerGroup
from fewstep.actors.trainer_rank import Metrics
from fewstep.kernels.model.checkpoint import save_model
from fewstep.pipelines.curriculum import Batches, Plan, plan_step, visible_block
from fewstep.pipelines.figures import PRETRAIN_PANELS, draw_curves
from fewstep.pipelines.pretrain_start import (
    Start,
    example_of,
    find_batches,
    find_start,
    job_fingerprint,
    log_lineage,
    open_corpus,
)
from fewstep.pipelines.progress import read_progress, told_how_to_resume, write_progress
from fewstep.pipelines.publish import log_checkpoint
from fewstep.pipelines.settings import PretrainConfig
from fewstep.pipelines.tracked_run import RunPlan, accelerator, tracked_run
from fewstep.platform.artifacts import atomic_folder
from fewstep.platform.errors import UserError
from fewstep.platform.records import DecodePolicy
from fewstep.platform.tracking import Tracker

OBJECTIVE = "fewstep.pipelines.objectives.denoise:Denoise"
REPORT_EVERY = 50


def run(config: PretrainConfig, tags: Mapping[str, str] | None = None) -> None:
    """Train, checkpoint, write `out/model`, `out/metrics.jsonl` and `out/curve.png`; tracked in MLflow.

    Args:
        tags: more tags of the run; `mlflow.parentRunId` nests it under another.

    Raises:
        UserError: model, data and configuration do not fit each other, or `out` holds another job; before work starts.
            Or training diverged.
    """
    corpus = open_corpus(config.data)
    start = find_start(config, corpus)
    fingerprint = job_fingerprint(config, start, corpus)
    # A checkpoint of another job is refused here, before anything is started or written.
    saved = read_progress(config.out / "checkpoint", fingerprint, resume=config.resume)
    origin = f"from {start.address}" if start.address else "from scratch"
    plan = RunPlan(
        kind="pretrain", config=config, out=config.out, tracking_uri=config.tracking_uri, experiment=config.experiment,
        description=f"The two-stage curriculum {origin}: masks first, edits added at the end.",
        resumed=saved is not None, required=config.require_tracking,
        tags={"machine.accelerator": accelerator(), "model.family": start.model.family, "model.source": start.address,
              "model.source_digest": start.digest, **(tags or {})},
    )  # fmt: skip
    with (
        tracked_run(plan) as tracker,
        told_how_to_resume(config.out / "checkpoint", config.steps, resume=config.resume),
        closing(
            TrainerGroup(
                start.model,
                start.initial,
                config.trainer,
                OBJECTIVE,
                replay=config.out / "diverged-batch.npz",
            )
        ) as trainer,
    ):
        first = 0
        if saved is not None:
            first = int(saved["step"])
            trainer.load((config.out / "checkpoint").resolve())
            print(f"resumed at step {first}", flush=True)
        log_lineage(tracker, config, corpus)
        log = _Log(config, first, tracker)
        _train(_Job(config, start, fingerprint, trainer, find_batches(config, start, corpus), log), first)
        save_model(config.out / "model", trainer.state(), start.model, start.tokenizer, start.source)
        draw_curves(config.out / "curve.png", {"pretrain": log.rows}, PRETRAIN_PANELS)
        tracker.log_figure("curve", config.out / "curve.png", step=config.steps)
        log_checkpoint(
            tracker, config.out / "model", name="pretrained", input_example=example_of(start, corpus),
            metrics={"checkpoint/nll_per_token": log.rows[-1]["nll_per_token"]}, policy=DecodePolicy(), step=config.steps,
        )  # fmt: skip
    print(f"wrote {config.out / 'model'}", flush=True)


@dataclass(frozen=True)
class _Job:
    """What the loop over steps works with."""

    config: PretrainConfig
    start: Start
    fingerprint: str
    trainer: TrainerGroup
    batches: Batches
    log: _Log


def _train(job: _Job, first: int) -> None:
    config, trainer = job.config, job.trainer
    samples = job.batches.draw(first)
    for step in range(first, config.steps):
        plan = plan_step(config, step)
        pending = trainer.start_update(samples, plan.learning_rate, visible_block(job.start.model, plan))
        if step + 1 < config.steps:
            samples = job.batches.draw(step + 1)  # while the ranks work
        job.log.step(step, plan, trainer.finish_update(pending))
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            with atomic_folder(config.out / "checkpoint") as folder:
                trainer.save(folder.resolve())
                # The data's position follows from the step; it is written for whoever reads the file.
                position = {"step": step + 1, "samples": (step + 1) * config.batch_size}
                write_progress(folder, job.fingerprint, position)


class _Log:
    """Progress lines on the terminal, one JSON line per report in metrics.jsonl, and the tracker."""

    def __init__(self, config: PretrainConfig, first: int, tracker: Tracker) -> None:
        self._config, self._start, self._tracker = config, time.monotonic(), tracker
        self._path = config.out / "metrics.jsonl"
        kept = self._path.read_text().splitlines() if first and self._path.is_file() else []
        kept = [line for line in kept if json.loads(line)["step"] <= first]
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in kept]
        self._before_s = self.rows[-1]["seconds"] if kept else 0.0
        self._path.write_text("".join(line + "\n" for line in kept))
        self._nll = self._targets = self._skipped = 0.0
        self._last: Metrics = {}

    def step(self, step: int, plan: Plan, metrics: Metrics) -> None:
        if metrics["skipped"]:
            self._skipped += 1
            print(f"step {step + 1}: the gradient is not finite; skipped", flush=True)
        else:
            self._nll += metrics["nll_sum"]
            self._targets += metrics["targets"]
            self._last = metrics
        last = step + 1 == self._config.steps
        if not self._targets:
            if last and not self.rows:
                raise UserError("gradient", "not finite in any step", "finite ones", "lower learning_rate")
            return
        if (step + 1) % REPORT_EVERY and not last:
            return
        seconds = self._before_s + time.monotonic() - self._start
        row = {
            "step": step + 1,
            "samples": (step + 1) * self._config.batch_size,
            "seconds": round(seconds, 1),
            "block_size": plan.block_size,
            "edits": plan.edits,
            "learning_rate": plan.learning_rate,
            "nll_per_token": self._nll / self._targets,
            "loss": self._last["loss"],
            "grad_norm": self._last["grad_norm"],
            "skipped": self._skipped,
        }
        self._nll = self._targets = self._skipped = 0.0
        self.rows.append(row)
        self._tracker.log_metrics(
            {f"train/{k}": v for k, v in row.items() if k not in ("step", "edits")}, step + 1
        )
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"step {row['step']:>6}/{self._config.steps}  block {plan.block_size:>2}  nll {row['nll_per_token']:.4f}"
            f"  grad {row['grad_norm']:.2f}  {seconds / 60:.1f} min",
            flush=True,
        )
