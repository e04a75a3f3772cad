"""`fewstep distill`: constrained-order training (Seed Diffusion, 2508.02193, eq. 9), on orders the model chose itself.

First the pool: orders of opening known texts, the likeliest kept. Then training on *compressed transitions* along them
(dFactory's path distillation): from the state before forward i predict all that opens before forward j > i, so that
several steps become one. Both parts go on where they were interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from fewstep.actors.trainer import TrainerGroup
from fewstep.actors.trainer_rank import Metrics
from fewstep.kernels.model.checkpoint import load_model, save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.rows import NO_TARGET, SampleRows
from fewstep.pipelines.adapters import ADAPTER, AdapterKeeper, adapter_tags
from fewstep.pipelines.corpus import Corpus
from fewstep.pipelines.corruption import EDIT_RATE_CAP, Sample, Tokens
from fewstep.pipelines.curriculum import learned_samples, normalised, ordinary_ids
from fewstep.pipelines.distill_settings import DistillConfig
from fewstep.pipelines.free_orders import FreeOrders
from fewstep.pipelines.order_pool import Order, draw_orders, fill_pool, read_pool
from fewstep.pipelines.pretrain_start import Start, check_data, given_model, job_fingerprint, open_corpus
from fewstep.pipelines.progress import kept_rows, read_progress, told_how_to_resume, write_progress
from fewstep.pipelines.schedule import rate_share
from fewstep.pipelines.tasks.family import Specification, draw_specification, render_body
from fewstep.pipelines.tasks.vocabulary import encode_pair
from fewstep.pipelines.tracked_run import RunPlan, accelerator, tracked_run
from fewstep.platform.artifacts import atomic_folder, file_digest
from fewstep.platform.errors import ConfigError
from fewstep.platform.rng import generator
from fewstep.platform.tracking import Tracker

OBJECTIVE = "fewstep.pipelines.objectives.distill:Distill"
REPORT_EVERY = 20


@dataclass(frozen=True)
class Teacher:
    """The model that draws the orders and learns from them, and its texts."""

    start: Start
    corpus: Corpus | None
    fingerprint: str

    @property
    def folder(self) -> Path:
        assert self.start.source is not None  # a teacher is never fresh
        return self.start.source

    @property
    def model(self) -> ModelConfig:
        return self.start.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.start.tokenizer


def run(config: DistillConfig) -> None:
    """Fill `out/pool`, train, write `out/model` and `out/metrics.jsonl`; tracked in MLflow.

    Raises:
        UserError: a model that is not block-causal, data in other tokens, an `out` of another job; before work starts.
    """
    teacher = find_teacher(config)
    saved = read_progress(config.out / "checkpoint", teacher.fingerprint, resume=config.resume)
    if read_progress(config.out / "pool", teacher.fingerprint, resume=config.resume) is None:
        _empty_pool(config.out / "pool", teacher.fingerprint)
    plan = RunPlan(
        kind="distill", config=config, out=config.out, tracking_uri=config.tracking_uri, experiment=config.experiment,
        description="Constrained-order training on the likeliest orders of opening.",
        resumed=saved is not None, required=config.require_tracking,
        tags={"machine.accelerator": accelerator(), "model.family": teacher.model.family, "model.source": teacher.start.address, "model.source_digest": teacher.start.digest, **adapter_tags(config.trainer.lora)},
    )  # fmt: skip
    checkpoint = config.out / "checkpoint"
    way_back = told_how_to_resume(checkpoint, config.steps, resume=config.resume, fresh=saved is None)
    with tracked_run(plan) as tracker, way_back:
        _fill(config, teacher)
        orders = read_pool(config.out / "pool")
        _log_data(tracker, config, teacher, orders)
        trainer = TrainerGroup(
            teacher.model, teacher.folder, config.trainer, OBJECTIVE, {"certainty": config.certainty},
            replay=config.out / "diverged-batch.npz",
        )  # fmt: skip
        with closing(trainer):
            first = 0
            if saved is not None:
                first = int(saved["step"])
                trainer.load(checkpoint.resolve())
                print(f"resumed at step {first}", flush=True)
            _train(config, teacher, orders, trainer, tracker, first)
            save_model(
                config.out / "model", trainer.state(), teacher.model, teacher.tokenizer, teacher.folder
            )
            keeper = AdapterKeeper(trainer, config.trainer.lora, teacher.start)
            keeper(config.out / ADAPTER)
            keeper.log(tracker, config.out / ADAPTER)
    print(f"wrote {config.out / 'model'}", flush=True)


def find_teacher(config: DistillConfig) -> Teacher:
    """The model and its texts, checked against each other.

    Raises:
        UserError: a model that is not block-causal or cannot be loaded, or data that do not fit it (`check_data`).
    """
    corpus = open_corpus(config.data)
    start = given_model(config.model, config.tracking_uri or "", config.trainer.lora)
    if start.model.attention_kind != "block_causal":
        raise ConfigError(
            "model",
            f"{start.address}, a {start.model.attention_kind} model",
            "a block-causal model",
            "choose another model",
        )
    check_data(start, corpus, [start.model.block_size], "model")
    return Teacher(start, corpus, job_fingerprint(config, start, corpus))


def specification_of(config: DistillConfig, number: int) -> Specification:
    """The task of the embedded family's training side that a sample is about."""
    draws = generator("distill-task", config.seed, number)
    while True:
        specification = draw_specification(draws)
        if not specification.held_out and specification.is_checkable():
            return specification


def text_of(config: DistillConfig, teacher: Teacher, number: int) -> Sample:
    """The text of a sample: a pair of the family, or a piece of a sequence of the corpus.

    Raises:
        ConfigError: a corpus with nothing to learn.
    """
    draws = generator("distill-text", config.seed, number)
    size, end = teacher.model.block_size, teacher.model.eos_token_id
    if teacher.corpus is None:
        specification = specification_of(config, number)
        tokens, num_prompt = encode_pair(
            teacher.tokenizer, specification.prompt, render_body(specification, draws)
        )
        return Sample.padded(tokens, num_prompt, size, end)
    number = int(draws.integers(len(teacher.corpus)))
    samples = learned_samples(teacher.corpus, number, teacher.model, size)
    return samples[int(draws.integers(len(samples)))]


def _fill(config: DistillConfig, teacher: Teacher) -> None:
    """The pool, or what is left of it."""
    network = load_model(teacher.folder, torch.float32)[0]

    def forced(number: int) -> list[Order]:
        return draw_orders(network, text_of(config, teacher, number), number, config.pool, config.seed)

    if not config.pool.num_free:
        fill_pool(config.out / "pool", forced, config.pool)
        return
    # An engine lays out its weights for itself, so it has a copy of its own.
    own = load_model(teacher.folder, torch.float32)[0]
    with FreeOrders(own, network, teacher.tokenizer, config.pool, config.seed) as free:
        fill_pool(
            config.out / "pool",
            lambda number: forced(number) + free.draw(specification_of(config, number).task(), number),
            config.pool,
        )


def transition(
    order: Order, model: ModelConfig, vocabulary: Tokens, corrupt_share: float, draws: np.random.Generator
) -> SampleRows:
    """One compressed transition in every block of an order.

    Block by block forwards i < j are drawn; what opened before i is visible, what opened from i to before j is the target,
    weighing 1 / (masked positions). With probability `corrupt_share` up to a tenth of the visible tokens are wrong and all
    visible ones are targets, too.
    """
    size = model.block_size
    start = order.num_prompt // size * size
    step, clean = order.step[start:], order.tokens[start:]
    rows = SampleRows.clean(order.tokens)
    tokens, targets = clean.copy(), np.full(len(clean), NO_TARGET)
    weights = np.zeros(len(clean), np.float32)
    for first in range(0, len(clean), size):
        own = slice(first, first + size)
        num_steps = int(step[own].max()) + 1
        if not num_steps:
            continue
        begin = int(draws.integers(num_steps))
        end = int(draws.integers(begin + 1, num_steps + 1))
        masked = step[own] >= begin
        learned = masked & (step[own] < end)
        tokens[own][masked] = model.mask_token_id
        targets[own][learned] = clean[own][learned]
        weights[own][learned] = 1.0 / masked.sum()
    visible = (step >= 0) & (tokens != model.mask_token_id)
    if draws.random() < corrupt_share and visible.any():
        at = visible.nonzero()[0]
        wrong = draws.choice(at, int(len(at) * draws.uniform(0.0, EDIT_RATE_CAP)), replace=False)
        tokens[wrong] = vocabulary[draws.integers(len(vocabulary), size=len(wrong))]
        targets[at], weights[at] = clean[at], 1.0 / size
    rows.add_state(tokens, np.arange(start, start + len(clean)), targets, weights)
    return rows


def draw_batch(
    config: DistillConfig, model: ModelConfig, vocabulary: Tokens, orders: Sequence[Order], step: int
) -> list[SampleRows]:
    """The transitions of a training step, keyed by (seed, step, place)."""
    samples = []
    for index in range(config.batch_size):
        draws = generator("distill", config.seed, step, index)
        order = orders[int(draws.integers(len(orders)))]
        samples.append(transition(order, model, vocabulary, config.corrupt_share, draws))
    return normalised(samples)


def _train(
    config: DistillConfig, teacher: Teacher, orders: Sequence[Order], trainer: TrainerGroup, tracker: Tracker, first: int
) -> None:  # fmt: skip
    vocabulary = ordinary_ids(teacher.tokenizer, teacher.model)
    path = config.out / "metrics.jsonl"
    kept_rows(path, first)
    for step in range(first, config.steps):
        done = step / config.steps
        rate = rate_share(step, done, warmup_steps=config.warmup_steps, decay_share=config.decay_share)
        batch = draw_batch(config, teacher.model, vocabulary, orders, step)
        metrics = trainer.update(batch, config.learning_rate * rate)
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == config.steps:
            _report(config, step + 1, metrics, path, tracker)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            with atomic_folder(config.out / "checkpoint") as folder:
                trainer.save(folder.resolve())
                write_progress(folder, teacher.fingerprint, {"step": step + 1})


def _report(config: DistillConfig, step: int, metrics: Metrics, path: Path, tracker: Tracker) -> None:
    if metrics["skipped"]:
        print(f"step {step}: the gradient is not finite; skipped", flush=True)
        return
    row = {
        "loss": metrics["loss"],
        "nll_per_token": metrics["nll_sum"] / metrics["targets"],
        "entropy_per_token": metrics["entropy_sum"] / metrics["targets"],
        "grad_norm": metrics["grad_norm"],
    }
    tracker.log_metrics({f"train/{name}": value for name, value in row.items()}, step)
    with path.open("a") as file:
        file.write(json.dumps({"step": step, **row}) + "\n")
    print(
        f"step {step:>6}/{config.steps}  nll {row['nll_per_token']:.4f}  entropy {row['entropy_per_token']:.4f}",
        flush=True,
    )


def _log_data(tracker: Tracker, config: DistillConfig, teacher: Teacher, orders: Sequence[Order]) -> None:
    parts = sorted((config.out / "pool").glob("part-*.parquet"))
    digest = hashlib.sha256("".join(file_digest(part) for part in parts).encode()).hexdigest()
    source = str(teacher.corpus.folder) if teacher.corpus is not None else "pairs of the embedded family"
    tracker.log_dataset(
        "order-pool", digest=digest[:16], context="training", source=source,
        profile={"num_orders": len(orders), "num_samples": config.pool.num_samples},
    )  # fmt: skip


def _empty_pool(folder: Path, fingerprint: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("part-*.parquet"):
        path.unlink()
    write_progress(folder, fingerprint, {})
