"""From credited rollouts to optimiser steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.actors.trainer_rank import LogprobSource, Metrics
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.rows import SampleRows
from fewstep.pipelines.estimators import Terms, clean_rows
from fewstep.pipelines.objectives.credit import Credit, RefineObjective
from fewstep.pipelines.retention import Retention
from fewstep.pipelines.schedule import rate_share
from fewstep.pipelines.settings import RefineConfig
from fewstep.platform.rng import generator


class Trainer(Protocol):
    """What the loop asks of the trainer ranks (actors/trainer.py)."""

    def update(self, samples: Sequence[SampleRows], learning_rate: float) -> Metrics: ...

    def logprobs(self, samples: Sequence[SampleRows], source: LogprobSource) -> list[NDArray[np.float32]]: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def adapter(self) -> dict[str, torch.Tensor]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def train(
    config: RefineConfig,
    model: ModelConfig,
    objective: RefineObjective,
    trainer: Trainer,
    credits: Sequence[Credit],
    step: int,
    done: float,
    retention: Retention | None = None,
) -> Metrics:
    """The step's optimiser updates, each on every `updates_per_step`-th group and on documents of `retention`; metrics
    are means over updates."""
    rate = learning_rate(config, step, done)
    parts: list[list[SampleRows]] = []
    for part in range(config.updates_per_step):
        own = [c for c in credits if c.rollout.group_id % config.updates_per_step == part and c.weight > 0]
        samples = list(training_rows(config, model, objective, own, step))
        # Every rank needs a share; a part with fewer good rollouts than ranks waits for better ones.
        if len(samples) >= config.trainer.num_ranks:
            parts.append(samples)
    # All before the first update: until then the trainer holds the weights that the step began with.
    _annotate(objective, trainer, parts)
    retained: Metrics = {}
    if retention is not None:
        retained = retain(retention, config.seed, step, trainer, parts)
    updates = [per_target(trainer.update(samples, rate)) for samples in parts]
    metrics: Metrics = {"train/learning_rate": rate, "train/updates": float(len(updates)), **retained}
    for name in updates[0] if updates else ():
        metrics[f"train/{name}"] = sum(update[name] for update in updates) / len(updates)
    if updates and "mismatch" in updates[0]:
        # Before the step's first update the trainer holds the weights that rolled out: what differs is arithmetic.
        metrics["train/mismatch"] = updates[0]["mismatch"]
    return metrics


def _annotate(objective: RefineObjective, trainer: Trainer, parts: Sequence[Sequence[SampleRows]]) -> None:
    """Give the rows the log-probabilities that the objective asks for and no rollout has recorded."""
    estimator = objective.estimator()
    flat = [sample for part in parts for sample in part]
    wanted: list[tuple[str, LogprobSource]] = []
    if not estimator.recorded or getattr(objective, "corrects_mismatch", False):
        wanted.append(("old_logprob", "current"))
    if getattr(objective, "has_reference", False):
        wanted.append(("reference_logprob", "reference"))
    for name, source in wanted if flat else ():
        for sample, values in zip(flat, trainer.logprobs(flat, source), strict=True):
            if name == "old_logprob" and estimator.recorded:
                sample.extras["rollout_logprob"] = sample.extras["old_logprob"]
            sample.extras[name] = values


def retain(
    retention: Retention, seed: int, step: int, trainer: Trainer, parts: Sequence[list[SampleRows]]
) -> Metrics:
    """Add the documents of every update to its samples, and what the frozen reference says of them.

    Returns:
        What it costs: documents a step, their share of all rows that are trained on, and the seconds of the reference.
    """
    shown = [retention.rows(seed, step, part) for part in range(len(parts))]
    flat = [rows for own in shown for rows in own]
    started = time.monotonic()
    if flat and retention.settings.form != "nll":
        for rows, values in zip(flat, trainer.logprobs(flat, "reference"), strict=True):
            rows.extras["reference_logprob"] = values
    seconds = time.monotonic() - started
    for samples, own in zip(parts, shown, strict=True):
        samples += own
        # A batch has the same extras in all of its rows.
        for name in dict.fromkeys(name for rows in samples for name in rows.extras):
            for rows in samples:
                rows.extras.setdefault(name, np.zeros(len(rows.tokens), np.float32))
    num_rows = sum(len(rows.tokens) for samples in parts for rows in samples)
    return {
        "train/retain_documents": float(len(flat)),
        "train/retain_row_share": sum(len(rows.tokens) for rows in flat) / max(1, num_rows),
        "train/retain_reference_seconds": seconds,
    }


def training_rows(
    config: RefineConfig, model: ModelConfig, objective: RefineObjective, credits: Sequence[Credit], step: int
) -> Iterator[SampleRows]:
    """Rows of the credited rollouts, weights normalised by the tokens all of them committed."""
    estimator = objective.estimator()
    total = sum(c.weight * len(c.rollout.trajectory.canvas_ids) for c in credits)
    for credit in credits:
        rollout = credit.rollout
        rows = clean_rows(rollout.trajectory, estimator.extras)
        terms = Terms(model.sees_block, model.mask_token_id, credit.weight / total, credit.advantage)
        draws = generator("estimator", config.seed, step, rollout.group_id, rollout.sample)
        cost = estimator.add_states(rows, rollout.trajectory, terms, draws)
        if cost:
            yield rows


def learning_rate(config: RefineConfig, step: int, done: float) -> float:
    """Linear warm-up, constant, then linear to a tenth."""
    return config.learning_rate * rate_share(
        step, done, warmup_steps=config.warmup_steps, decay_share=config.decay_share, floor=0.1
    )


def per_target(sums: Metrics) -> Metrics:
    """Sums over targets (`*_sum`) become means; those of retention (`retain_*_sum`) over the documents' targets, all others
    over the rollouts'."""
    retained = sums.get("retain_targets", 0.0)
    targets = sums.get("targets", 0.0) - retained
    return {
        name.removesuffix("_sum"): value / max(1.0, retained if name.startswith("retain_") else targets)
        if name.endswith("_sum")
        else value
        for name, value in sums.items()
    }
