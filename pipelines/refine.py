"""`fewstep refine`: the on-policy loop, on one screen.

    roll out with the deployed sampler → verify in the sandbox → credit → update → push the weights

Everything a step needs is keyed by (run seed, step, prompt, sample), so a run that resumes at a checkpoint sees
the prompts and random numbers it would have seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer

from fewstep.actors.engine.request import Request
from fewstep.actors.engine.text import decode
from fewstep.actors.trainer import Metrics
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.rows import SampleRows
from fewstep.pipelines.estimators import Terms, clean_rows
from fewstep.pipelines.objectives.credit import Credit, RefineObjective
from fewstep.pipelines.rollout_samples import CREDIT, EXTRACT, GENERATE, VERIFY, log_traces, spread
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.tasks.family import draw_specification
from fewstep.platform.records import DecodePolicy, Rollout, Task, Trajectory, Verdict, WeightVersion
from fewstep.platform.rng import derive_seed, generator
from fewstep.platform.rollout_trace import Window
from fewstep.platform.tracking import Tracker
from fewstep.platform.trajectories import write_rollouts

PASS_RATE_MEMORY = 0.8  # of the moving pass rate, per step


class Trainer(Protocol):
    """What the loop asks of the trainer ranks (actors/trainer.py)."""

    def update(self, samples: Sequence[SampleRows], learning_rate: float) -> Metrics: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Workers:
    """The loop's hands: Ray pools in a real run, one process's engine and sandbox in a debugger."""

    generate: Callable[[Sequence[Request]], list[Trajectory]]
    verify: Callable[[Sequence[tuple[Task, str]]], list[Verdict]]
    trainer: Trainer
    push: Callable[[Mapping[str, torch.Tensor], WeightVersion], Mapping[str, float]]


@dataclass
class Progress:
    """What a resumed run needs beside the trainer's own checkpoint."""

    step: int = 0
    threshold: float = 0.9
    pass_rate: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def refine(
    config: RefineConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    objective: RefineObjective,
    workers: Workers,
    tracker: Tracker,
    progress: Progress,
    checkpoint: Callable[[Progress], None],
) -> Progress:
    """Run training steps until `config.steps` or `config.max_seconds`; returns the final progress."""
    started = time.monotonic() - progress.seconds
    while progress.step < config.steps and (config.max_seconds or 1e18) > progress.seconds:
        clock = _Clock()
        done = share_done(config, progress)
        policy = rollout_policy(config, progress.threshold)
        tasks = draw_tasks(config.seed, progress.step, config.prompts_per_step)
        trajectories = workers.generate(make_requests(config, tokenizer, tasks, policy, progress.step))
        clock.lap(GENERATE)
        texts = [decode(tokenizer, trajectory.completion_ids.tolist()) for trajectory in trajectories]
        jobs = [(tasks[i // config.group_size], text) for i, text in enumerate(texts)]
        clock.lap(EXTRACT)
        verdicts = workers.verify(jobs)
        clock.lap(VERIFY)
        credits = give_credit(config, objective, jobs, trajectories, verdicts, done)
        clock.lap(CREDIT)
        write_rollouts(
            config.out / "rollouts" / f"step_{progress.step:05d}.parquet",
            [replace(c.rollout, reward=c.reward, advantage=c.advantage) for c in credits],
            {"step": progress.step, "threshold": progress.threshold},
        )
        metrics = train(config, model, objective, workers.trainer, credits, progress.step, done)
        clock.lap("train")
        version = WeightVersion(tracker.run_id, progress.step + 1, "")
        metrics |= workers.push(workers.trainer.state(), version)
        clock.lap("push")
        metrics |= rollout_metrics(credits) | clock.seconds() | {"rollout/threshold": progress.threshold}
        log_traces(
            tracker, {task.task_id: task.prompt for task in tasks}, credits, clock.windows, seed=config.seed,
            step=progress.step, per_step=config.traces_per_step,
        )  # fmt: skip
        advance(config, progress, metrics, time.monotonic() - started)
        tracker.log_metrics(metrics | spread(credits), progress.step)
        report_step(config, progress, metrics)
        if progress.step % config.checkpoint_every == 0:
            checkpoint(progress)
    return progress


def share_done(config: RefineConfig, progress: Progress) -> float:
    """Share of the run that lies behind, by steps or by seconds, whichever ends it first."""
    by_time = progress.seconds / config.max_seconds if config.max_seconds else 0.0
    return min(1.0, max(progress.step / config.steps, by_time))


def rollout_policy(config: RefineConfig, threshold: float) -> DecodePolicy:
    """The deployed sampler at the curriculum's threshold."""
    return DecodePolicy(kind="threshold", threshold=round(threshold, 6), temperature=config.temperature)


def draw_tasks(seed: int, step: int, count: int) -> list[Task]:
    """Distinct checkable tasks of the training side, keyed by (seed, step)."""
    draws = generator("refine-tasks", seed, step)
    chosen: dict[str, Task] = {}
    while len(chosen) < count:
        specification = draw_specification(draws)
        if not specification.held_out and specification.text not in chosen and specification.is_checkable():
            chosen[specification.text] = specification.task()
    return list(chosen.values())


def make_requests(
    config: RefineConfig, tokenizer: Tokenizer, tasks: Sequence[Task], policy: DecodePolicy, step: int
) -> list[Request]:
    """group_size requests per task, in task order, each with a seed of its own."""
    requests = []
    for prompt, task in enumerate(tasks):
        ids = tuple(tokenizer.encode(task.prompt).ids)
        for sample in range(config.group_size):
            seed = derive_seed("rollout", config.seed, step, prompt, sample)
            own = policy.model_copy(update={"seed": seed})
            requests.append(Request(f"{step}-{prompt}-{sample}", ids, own, config.max_tokens))
    return requests


def give_credit(
    config: RefineConfig,
    objective: RefineObjective,
    jobs: Sequence[tuple[Task, str]],
    trajectories: Sequence[Trajectory],
    verdicts: Sequence[Verdict],
    done: float,
) -> list[Credit]:
    """The objective's credits, group by group, in request order."""
    credits: list[Credit] = []
    for start in range(0, len(jobs), config.group_size):
        group = [
            Rollout(
                task_id=jobs[i][0].task_id,
                group_id=start // config.group_size,
                sample=i - start,
                text=jobs[i][1],
                trajectory=trajectories[i],
                verdict=verdicts[i],
                reward=0.0,
            )
            for i in range(start, start + config.group_size)
        ]
        credits += objective.credit(group, done)
    return credits


def train(
    config: RefineConfig,
    model: ModelConfig,
    objective: RefineObjective,
    trainer: Trainer,
    credits: Sequence[Credit],
    step: int,
    done: float,
) -> Metrics:
    """The step's optimiser updates, each on every `updates_per_step`-th group; metrics are means over updates."""
    rate = learning_rate(config, step, done)
    updates: list[Metrics] = []
    for part in range(config.updates_per_step):
        own = [c for c in credits if c.rollout.group_id % config.updates_per_step == part and c.weight > 0]
        samples = list(training_rows(config, model, objective, own, step))
        # Every rank needs a share; a part with fewer good rollouts than ranks waits for better ones.
        if len(samples) >= config.trainer.num_ranks:
            updates.append(per_target(trainer.update(samples, rate)))
    metrics: Metrics = {"train/learning_rate": rate, "train/updates": float(len(updates))}
    for name in updates[0] if updates else ():
        metrics[f"train/{name}"] = sum(update[name] for update in updates) / len(updates)
    if updates and "mismatch" in updates[0]:
        # Before the step's first update the trainer holds the weights that rolled out: what differs is arithmetic.
        metrics["train/mismatch"] = updates[0]["mismatch"]
    return metrics


def training_rows(
    config: RefineConfig, model: ModelConfig, objective: RefineObjective, credits: Sequence[Credit], step: int
) -> Iterator[SampleRows]:
    """Rows of the credited rollouts, weights normalised by the tokens all of them committed."""
    estimator = objective.estimator()
    total = sum(c.weight * len(c.rollout.trajectory.canvas_ids) for c in credits)
    for credit in credits:
        rollout = credit.rollout
        rows = clean_rows(rollout.trajectory)
        terms = Terms(model.sees_block, model.mask_token_id, credit.weight / total, credit.advantage)
        draws = generator("estimator", config.seed, step, rollout.group_id, rollout.sample)
        cost = estimator.add_states(rows, rollout.trajectory, terms, draws)
        if cost:
            yield rows


def learning_rate(config: RefineConfig, step: int, done: float) -> float:
    """Linear warm-up, constant, then linear to a tenth."""
    rate = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay_share:
        rate = min(rate, max(0.1, (1.0 - done) / config.decay_share))
    return config.learning_rate * rate


def per_target(sums: Metrics) -> Metrics:
    """Sums over targets (`*_sum`) become means."""
    targets = max(1.0, sums.get("targets", 0.0))
    return {
        name.removesuffix("_sum"): value / targets if name.endswith("_sum") else value
        for name, value in sums.items()
    }


def rollout_metrics(credits: Sequence[Credit]) -> Metrics:
    """What the step's rollouts were like."""
    trajectories = [credit.rollout.trajectory for credit in credits]
    tokens = sum(trajectory.num_tokens for trajectory in trajectories)
    forwards = sum(trajectory.forwards for trajectory in trajectories)
    count = len(credits)
    return {
        "reward/mean": sum(credit.reward for credit in credits) / count,
        "reward/pass_rate": sum(credit.rollout.verdict.passed for credit in credits) / count,
        "reward/used_share": sum(credit.weight > 0 for credit in credits) / count,
        "rollout/forwards_per_answer": forwards / count,
        "rollout/tokens_per_forward": tokens / max(1, forwards),
        "rollout/tokens_per_answer": tokens / count,
    }


def advance(config: RefineConfig, progress: Progress, metrics: Metrics, seconds: float) -> None:
    """Count the step and move the curriculum's threshold."""
    rate = metrics["reward/pass_rate"]
    first = progress.step == 0
    progress.pass_rate = (
        rate if first else PASS_RATE_MEMORY * progress.pass_rate + (1 - PASS_RATE_MEMORY) * rate
    )
    curriculum = config.curriculum
    move = -curriculum.step if progress.pass_rate >= curriculum.pass_rate else curriculum.step
    progress.threshold = min(curriculum.start, max(curriculum.end, progress.threshold + move))
    progress.step += 1
    progress.seconds = seconds
    metrics["perf/step_seconds"] = seconds - (progress.history[-1]["seconds"] if progress.history else 0.0)
    progress.history.append({"step": progress.step, "seconds": seconds, **metrics})


def report_step(config: RefineConfig, progress: Progress, metrics: Metrics) -> None:
    """One progress line."""
    print(
        f"refine {progress.step:>4}/{config.steps}  pass {metrics['reward/pass_rate']:.2f}"
        f"  forwards {metrics['rollout/forwards_per_answer']:5.2f}  TPF {metrics['rollout/tokens_per_forward']:5.2f}"
        f"  threshold {metrics['rollout/threshold']:.2f}  gen {metrics['perf/generate_seconds']:.1f}s"
        f" ver {metrics['perf/verify_seconds']:.1f}s train {metrics['perf/train_seconds']:.1f}s"
        f"  {progress.seconds / 60:.1f} min",
        flush=True,
    )


class _Clock:
    """The stages of a step, one after the other without a gap."""

    def __init__(self) -> None:
        self._last = time.time_ns()
        self.windows: dict[str, Window] = {}

    def lap(self, name: str) -> None:
        """Everything since the last lap was this stage."""
        now = time.time_ns()
        self.windows[name] = Window(self._last, now)
        self._last = now

    def seconds(self) -> Metrics:
        """`perf/NAME_seconds` of each stage."""
        return {f"perf/{name}_seconds": window.seconds for name, window in self.windows.items()}
