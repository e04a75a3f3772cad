"""`fewstep pretrain`: the two-stage curriculum, from scratch or from a given model, on the family or on a corpus.

Step s of a run is a pure function of (configuration, data, seed, s) and of the weights before it, so an interrupted
run that resumes at a checkpoint ends where an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

from fewstep.actors.trainer import TrainerGroup
from fewstep.kernels.model.checkpoint import save_model
from fewstep.pipelines.adapters import ADAPTER, AdapterKeeper, adapter_tags
from fewstep.pipelines.curriculum import Batches, plan_step, visible_block
from fewstep.pipelines.figures import PRETRAIN_PANELS, draw_curves
from fewstep.pipelines.pretrain_log import PretrainLog
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
from fewstep.platform.records import DecodePolicy

OBJECTIVE = "fewstep.pipelines.objectives.denoise:Denoise"


def run(config: PretrainConfig, tags: Mapping[str, str] | None = None) -> None:
    """Train, checkpoint, write `out/model`, `out/metrics.jsonl` and `out/curve.png`; tracked in MLflow.

    With `trainer.lora` also `out/adapter`, which is in `out/model` already.

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
              "model.source_digest": start.digest, **adapter_tags(config.trainer.lora), **(tags or {})},
    )  # fmt: skip
    with tracked_run(plan) as tracker:
        way_back = told_how_to_resume(
            config.out / "checkpoint", config.steps, resume=config.resume, fresh=saved is None
        )
        with way_back, closing(_trainer(config, start)) as trainer:
            first = 0
            if saved is not None:
                first = int(saved["step"])
                trainer.load((config.out / "checkpoint").resolve())
                print(f"resumed at step {first}", flush=True)
            log_lineage(tracker, config, corpus)
            log = PretrainLog(config, first, tracker, trainer.matmul_rate())
            _train(_Job(config, start, fingerprint, trainer, find_batches(config, start, corpus), log), first)
            save_model(config.out / "model", trainer.state(), start.model, start.tokenizer, start.source)
            keeper = AdapterKeeper(trainer, config.trainer.lora, start)
            keeper(config.out / ADAPTER)
            keeper.log(tracker, config.out / ADAPTER)
            draw_curves(config.out / "curve.png", {"pretrain": log.rows}, PRETRAIN_PANELS)
            tracker.log_figure("curve", config.out / "curve.png", step=config.steps)
            log_checkpoint(
                tracker, config.out / "model", name="pretrained", input_example=example_of(start, corpus),
                metrics={"checkpoint/nll_per_token": log.rows[-1]["nll_per_token"]}, policy=DecodePolicy(), step=config.steps,
            )  # fmt: skip
    print(f"wrote {config.out / 'model'}", flush=True)


def _trainer(config: PretrainConfig, start: Start) -> TrainerGroup:
    return TrainerGroup(
        start.model, start.initial, config.trainer, OBJECTIVE, replay=config.out / "diverged-batch.npz"
    )


@dataclass(frozen=True)
class _Job:
    """What the loop over steps works with."""

    config: PretrainConfig
    start: Start
    fingerprint: str
    trainer: TrainerGroup
    batches: Batches
    log: PretrainLog


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
