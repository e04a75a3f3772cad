"""`fewstep pretrain`: the two-stage curriculum from scratch on the embedded task family.

Step s of a run is a pure function of (configuration, seed, s) and of the weights before it, so an interrupted
run that resumes at a checkpoint ends where an uninterrupted one does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fewstep.actors.trainer import Metrics, TrainerGroup
from fewstep.kernels.model.checkpoint import save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.rows import SampleRows
from fewstep.pipelines.corruption import Sample, edit_state, mask_states
from fewstep.pipelines.figures import PRETRAIN_PANELS, draw_curves
from fewstep.pipelines.progress import read_progress, write_progress
from fewstep.pipelines.publish import log_checkpoint
from fewstep.pipelines.settings import PretrainConfig
from fewstep.pipelines.tasks.family import draw_pair
from fewstep.pipelines.tasks.vocabulary import (
    EOS_ID,
    MASK_ID,
    PAD_ID,
    build_tokenizer,
    encode_pair,
    family_ids,
)
from fewstep.pipelines.tracked_run import RunPlan, accelerator, tracked_run
from fewstep.platform.artifacts import atomic_folder
from fewstep.platform.records import DecodePolicy
from fewstep.platform.rng import generator
from fewstep.platform.tracking import Tracker

OBJECTIVE = "fewstep.pipelines.objectives.denoise:Denoise"
REPORT_EVERY = 50


@dataclass(frozen=True)
class Plan:
    """What one step of the curriculum does."""

    block_size: int
    edits: bool
    learning_rate: float


def plan_step(config: PretrainConfig, step: int) -> Plan:
    """The block size of the phase, whether edits are on, and the rate: linear warm-up, constant, linear to zero."""
    done = step / config.steps
    edge, block_size = 0.0, config.phases[-1].block_size
    for phase in config.phases:
        edge += phase.share
        if done < edge - 1e-9:
            block_size = phase.block_size
            break
    rate = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay_share:
        rate = min(rate, (1.0 - done) / config.decay_share)
    return Plan(block_size, done >= 1.0 - config.edit_share, config.learning_rate * rate)


class Batches:
    """Draws the samples of a step; every number is keyed by (run seed, step, sample)."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._vocabulary = family_ids(tokenizer)

    def draw(self, step: int) -> list[SampleRows]:
        plan = plan_step(self._config, step)
        samples = [self._sample(plan, step, index) for index in range(self._config.batch_size)]
        total = sum(int((sample.targets >= 0).sum()) for sample in samples)
        for sample in samples:
            sample.weights /= total
        return samples

    def _sample(self, plan: Plan, step: int, index: int) -> SampleRows:
        draws = generator("pretrain", self._config.seed, step, index)
        tokens, num_prompt = encode_pair(self._tokenizer, *draw_pair(draws))
        sample = Sample.padded(tokens, num_prompt, plan.block_size, EOS_ID)
        rows = SampleRows.clean(sample.tokens)
        mask_states(
            sample,
            rows,
            block_size=plan.block_size,
            mask_token=MASK_ID,
            min_rate=self._config.min_mask_rate,
            complementary=self._config.complementary,
            draws=draws,
        )
        if plan.edits:
            edit_state(sample, rows, block_size=plan.block_size, vocabulary=self._vocabulary, draws=draws)
        return rows


def run(config: PretrainConfig, tags: Mapping[str, str] | None = None) -> None:
    """Train, checkpoint, write `out/model`, `out/metrics.jsonl` and `out/curve.png`; tracked in MLflow.

    Args:
        tags: more tags of the run; `mlflow.parentRunId` nests it under another.
    """
    tokenizer = build_tokenizer()
    model_config = model_of(config, tokenizer)
    # A checkpoint of another configuration is refused here, before anything is started or written.
    saved = read_progress(config.out / "checkpoint", _fingerprint(config), resume=config.resume)
    plan = RunPlan(
        kind="pretrain", config=config, out=config.out, tracking_uri=config.tracking_uri, experiment=config.experiment,
        description="The two-stage curriculum from scratch: masks first, edits added at the end.",
        resumed=saved is not None, required=config.require_tracking,
        tags={"machine.accelerator": accelerator(), "model.family": "block-diffusion", **(tags or {})},
    )  # fmt: skip
    with (
        tracked_run(plan) as tracker,
        closing(TrainerGroup(model_config, config.seed, config.trainer, OBJECTIVE)) as trainer,
    ):
        first = 0
        if saved is not None:
            first = int(saved["step"])
            trainer.load((config.out / "checkpoint").resolve())
            print(f"resumed at step {first}", flush=True)
        tracker.log_dataset(
            "family-training", digest=f"{config.seed:016x}", context="training",
            source=f"pairs of the embedded family's training side, keyed by (seed {config.seed}, step, sample)",
        )  # fmt: skip
        log = _Log(config, first, tracker)
        _train(config, trainer, Batches(config, tokenizer), log, first)
        save_model(config.out / "model", trainer.state(), model_config, tokenizer)
        draw_curves(config.out / "curve.png", {"pretrain": log.rows}, PRETRAIN_PANELS)
        tracker.log_figure("curve", config.out / "curve.png", step=config.steps)
        log_checkpoint(
            tracker, config.out / "model", name="pretrained", input_example=draw_pair(generator("example", config.seed))[0],
            metrics={"checkpoint/nll_per_token": log.rows[-1]["nll_per_token"]}, policy=DecodePolicy(), step=config.steps,
        )  # fmt: skip
    print(f"wrote {config.out / 'model'}", flush=True)


def _train(config: PretrainConfig, trainer: TrainerGroup, batches: Batches, log: _Log, first: int) -> None:
    samples = batches.draw(first)
    for step in range(first, config.steps):
        plan = plan_step(config, step)
        pending = trainer.start_update(samples, plan.learning_rate, plan.block_size)
        if step + 1 < config.steps:
            samples = batches.draw(step + 1)  # while the ranks work
        log.step(step, plan, trainer.finish_update(pending))
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            _checkpoint(config, trainer, step + 1)


def model_of(config: PretrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's full configuration: the sizes of `config.model` and the tokenizer's special tokens."""
    sizes: dict[str, Any] = config.model.model_dump()
    return ModelConfig(
        **sizes,
        head_dim=config.model.hidden_size // config.model.num_attention_heads,
        vocab_size=tokenizer.get_vocab_size(),
        mask_token_id=MASK_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def _checkpoint(config: PretrainConfig, trainer: TrainerGroup, step: int) -> None:
    with atomic_folder(config.out / "checkpoint") as folder:
        trainer.save(folder.resolve())
        write_progress(folder, _fingerprint(config), {"step": step})


def _fingerprint(config: PretrainConfig) -> str:
    # Where a run is recorded is no part of what it computes.
    untracked = {"tracking_uri": None, "require_tracking": True, "experiment": ""}
    return config.model_copy(update={"out": Path(), "resume": True, **untracked}).model_dump_json()


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
        self._nll = self._targets = 0.0

    def step(self, step: int, plan: Plan, metrics: Metrics) -> None:
        self._nll += metrics["nll_sum"]
        self._targets += metrics["targets"]
        if (step + 1) % REPORT_EVERY and step + 1 != self._config.steps:
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
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
        }
        self._nll = self._targets = 0.0
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
