"""`fewstep refine`: the on-policy loop, on one screen.

    roll out with the deployed sampler → judge → credit → update → push the weights

Everything a step needs is keyed by (run seed, step, prompt, sample), so a run that resumes at a checkpoint sees
the prompts and random numbers it would have seen.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from fewstep.actors.trainer_rank import Metrics
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.frontier import Generate, Verify
from fewstep.pipelines.held_out_checks import HeldOutChecks, Standing
from fewstep.pipelines.objectives.credit import Credit, RefineObjective
from fewstep.pipelines.policy_update import Trainer, train
from fewstep.pipelines.retention import Retention
from fewstep.pipelines.rollout_samples import log_traces, spread
from fewstep.pipelines.rollouts import (
    Batch,
    Batches,
    MadeAhead,
    MadeNow,
    Push,
    Recorded,
    RolloutMaker,
    rollout_file,
)
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.task_source import TaskSource
from fewstep.platform.records import Rollout, WeightVersion
from fewstep.platform.rollout_trace import CREDIT, Clock
from fewstep.platform.tracking import Tracker
from fewstep.platform.trajectories import write_rollouts

PASS_RATE_MEMORY = 0.8  # of the moving pass rate, per step
BEST = "best"
"""Folder of the weights that looked best on held-out tasks, by step."""


def no_adapter(folder: Path) -> None:
    """What keeping the adapter is where all weights are trained."""


@dataclass(frozen=True)
class Workers:
    """The loop's hands: Ray pools in a real run, one process's engine and sandbox in a debugger.

    Attributes:
        keep_adapter: writes the trainer's adapter into a folder, if it trains one.
    """

    generate: Generate
    verify: Verify
    trainer: Trainer
    push: Push
    keep_adapter: Callable[[Path], None] = no_adapter


@dataclass
class Progress:
    """What a resumed run needs beside the trainer's own checkpoint.

    Attributes:
        stopped: why the run ends before its steps are done; empty = it does not.
        retained: digest of the unrefined model's own answers that are retained on (`Retention.answers`).
    """

    step: int = 0
    threshold: float = 0.9
    pass_rate: float = 0.0
    seconds: float = 0.0
    stopped: str = ""
    retained: str = ""
    standing: Standing = field(default_factory=Standing)
    history: list[dict[str, float]] = field(default_factory=list)


def refine(
    config: RefineConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    source: TaskSource,
    objective: RefineObjective,
    workers: Workers,
    tracker: Tracker,
    progress: Progress,
    checkpoint: Callable[[Progress], None],
    retention: Retention | None = None,
) -> Progress:
    """Run training steps until `config.steps` or `config.max_seconds`, or until the quality is lost; returns the final
    progress. `retention` = what the model must stay on."""
    trainer, out = workers.trainer, config.out
    checks = HeldOutChecks(
        config, source, model, tokenizer, workers.generate, workers.verify, out / BEST, workers.keep_adapter
    )  # fmt: skip
    checks.set_bar(progress.standing)
    started = time.monotonic() - progress.seconds
    with closing(batches_of(config, tokenizer, source, workers)) as batches:
        while not finished(config, progress):
            clock, step, done = Clock(), progress.step, share_done(config, progress)
            batch = batches.take(step, progress.threshold, done)
            clock.lap("rollouts")
            credits = give_credit(objective, batch)
            clock.lap(CREDIT)
            write_rollouts(rollout_file(out / "rollouts", step), credited(credits), batch.facts(step))
            metrics = train(config, model, objective, trainer, credits, step, batch.done, retention)
            clock.lap("train")
            state = trainer.state()
            metrics |= batches.push(state, WeightVersion(tracker.run_id, step + 1, ""))
            clock.lap("push")
            if checks.due(progress.standing, step + 1):
                look = partial(checks.look, progress.standing, step + 1, progress.threshold, state)
                metrics |= batches.between(look)
                clock.lap("held_out")
            windows = {**clock.windows, **batch.windows}
            metrics |= rollout_metrics(credits, step) | {"rollout/threshold": batch.threshold}
            metrics |= {f"perf/{name}_seconds": window.seconds for name, window in windows.items()}
            if batch.windows:
                log_traces(
                    tracker, batch.prompts, credits, windows, seed=config.seed, step=step,
                    per_step=config.traces_per_step,
                )  # fmt: skip
            advance(config, progress, metrics, time.monotonic() - started)
            if checks.given_up(progress.standing):
                progress.stopped = f"pass@1 on held-out tasks was below {progress.standing.bar:.3f} {progress.standing.losses} looks in a row"
            tracker.log_metrics(metrics | spread(credits), progress.step)
            report_step(config, progress, metrics)
            if progress.step % config.checkpoint_every == 0:
                checkpoint(progress)
        if checks.due(progress.standing, progress.step, last=True):
            look = partial(checks.look, progress.standing, progress.step, progress.threshold, trainer.state())
            tracker.log_metrics(batches.between(look), progress.step)
    return progress


def batches_of(config: RefineConfig, tokenizer: Tokenizer, source: TaskSource, workers: Workers) -> Batches:
    """Where the rollouts of a configuration come from."""
    if config.replay is not None:
        return Recorded(config.replay, workers.push)
    maker = RolloutMaker(config, source, tokenizer, workers.generate, workers.verify)
    if config.max_staleness:
        return MadeAhead(maker, workers.push, config.max_staleness, config.steps)
    return MadeNow(maker, workers.push)


def finished(config: RefineConfig, progress: Progress) -> bool:
    """Whether no step is left."""
    out_of_time = config.max_seconds is not None and progress.seconds >= config.max_seconds
    return progress.step >= config.steps or out_of_time or bool(progress.stopped)


def share_done(config: RefineConfig, progress: Progress) -> float:
    """Share of the run that lies behind, by steps or by seconds, whichever ends it first."""
    by_time = progress.seconds / config.max_seconds if config.max_seconds else 0.0
    return min(1.0, max(progress.step / config.steps, by_time))


def give_credit(objective: RefineObjective, batch: Batch) -> list[Credit]:
    """The objective's credits, group by group, in request order."""
    credits: list[Credit] = []
    for _, group in itertools.groupby(batch.rollouts, key=lambda rollout: rollout.group_id):
        credits += objective.credit(list(group), batch.done)
    return credits


def credited(credits: Sequence[Credit]) -> list[Rollout]:
    """The rollouts with what the objective made of them."""
    return [replace(c.rollout, reward=c.reward, advantage=c.advantage) for c in credits]


def rollout_metrics(credits: Sequence[Credit], step: int) -> Metrics:
    """What the step's rollouts were like, and how many versions the weights that made them lay behind."""
    trajectories = [credit.rollout.trajectory for credit in credits]
    tokens = sum(trajectory.num_tokens for trajectory in trajectories)
    forwards = sum(trajectory.forwards for trajectory in trajectories)
    count = len(credits)
    versions = [int(trajectory.weight_version_first.split(":")[-2]) for trajectory in trajectories]
    return {
        "reward/mean": sum(credit.reward for credit in credits) / count,
        "reward/score": sum(credit.rollout.verdict.score for credit in credits) / count,
        "reward/pass_rate": sum(credit.rollout.verdict.passed for credit in credits) / count,
        "reward/used_share": sum(credit.weight > 0 for credit in credits) / count,
        "rollout/forwards_per_answer": forwards / count,
        "rollout/tokens_per_forward": tokens / max(1, forwards),
        "rollout/tokens_per_answer": tokens / count,
        "rollout/staleness": step - sum(versions) / count,
        "rollout/staleness_max": float(step - min(versions)),
    }


def advance(config: RefineConfig, progress: Progress, metrics: Metrics, seconds: float) -> None:
    """Count the step and move the curriculum's threshold: down while rollouts pass and, where the configuration asks
    for it, held-out tasks do; up otherwise."""
    rate = metrics["reward/pass_rate"]
    first = progress.step == 0
    progress.pass_rate = (
        rate if first else PASS_RATE_MEMORY * progress.pass_rate + (1 - PASS_RATE_MEMORY) * rate
    )
    curriculum = config.curriculum
    holds = progress.standing.holds or not config.held_out_checks.gates_curriculum
    move = -curriculum.step if progress.pass_rate >= curriculum.pass_rate and holds else curriculum.step
    progress.threshold = min(curriculum.start, max(curriculum.end, progress.threshold + move))
    progress.step += 1
    progress.seconds = seconds
    metrics["perf/step_seconds"] = seconds - (progress.history[-1]["seconds"] if progress.history else 0.0)
    progress.history.append({"step": progress.step, "seconds": seconds, **metrics})


def report_step(config: RefineConfig, progress: Progress, metrics: Metrics) -> None:
    """One progress line."""
    named = (("gen", "generate"), ("ver", "verify"), ("train", "train"))
    shown = [(short, metrics.get(f"perf/{name}_seconds")) for short, name in named]
    stages = " ".join(f"{short} {seconds:.1f}s" for short, seconds in shown if seconds is not None)
    if "held_out/pass_at_1" in metrics:
        stages += (
            f"  held out {metrics['held_out/pass_at_1']:.2f}, {metrics['held_out/forwards_per_answer']:.2f}"
        )
    print(
        f"refine {progress.step:>4}/{config.steps}  pass {metrics['reward/pass_rate']:.2f}"
        f"  forwards {metrics['rollout/forwards_per_answer']:5.2f}  TPF {metrics['rollout/tokens_per_forward']:5.2f}"
        f"  threshold {metrics['rollout/threshold']:.2f}  {stages}"
        f"  {progress.seconds / 60:.1f} min",
        flush=True,
    )
