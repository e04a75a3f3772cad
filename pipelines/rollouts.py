"""Batches of judged rollouts: made now, made ahead of the training, or read back from an earlier run.

The loop asks for the batch of a step and hands over the weights of a step; in which order the two reach the engines is
what the three kinds of `Batches` differ in. Engines are touched by one thread at a time, and so a batch is made by one
version of the weights from its first token to its last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tokenizers import Tokenizer

from fewstep.actors.trainer_rank import Metrics
from fewstep.pipelines.frontier import Generate, Verify, answer
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.task_source import TaskSource
from fewstep.platform.errors import UserError
from fewstep.platform.records import DecodePolicy, Rollout, WeightVersion
from fewstep.platform.rng import derive_seed
from fewstep.platform.rollout_trace import Window
from fewstep.platform.trajectories import read_metadata, read_rollouts

_FORGIVEN = 3
"""Failures of the verifier itself that a step is not given up for, however small its batch: the next one is another."""

State = Mapping[str, torch.Tensor]
Push = Callable[[State, WeightVersion], Mapping[str, float]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """The rollouts of a step, in request order.

    Attributes:
        rollouts: rewards and advantages are the objective's to fill in.
        prompts: task id to prompt text.
        threshold: of the sampler; done: share of the run that lay behind when it was asked for.
        windows: when each stage of making it began and ended; empty for recorded ones.
    """

    rollouts: Sequence[Rollout]
    prompts: Mapping[str, str]
    threshold: float
    done: float
    windows: Mapping[str, Window] = field(default_factory=dict)

    def facts(self, step: int) -> dict[str, Any]:
        """What the batch's file says of it; enough to train on it again."""
        return {
            "step": step, "threshold": self.threshold, "share_done": self.done, "prompts": dict(self.prompts),
        }  # fmt: skip


class Batches(Protocol):
    """Where the loop's batches come from."""

    def take(self, step: int, threshold: float, done: float) -> Batch:
        """The batch of a step."""

    def push(self, state: State, version: WeightVersion) -> Metrics:
        """Hand over the weights that a step ended with."""

    def between(self, work: Callable[[], Result]) -> Result:
        """Do something else with the engines while they make no batch."""

    def close(self) -> None:
        """Make no more."""


class RolloutMaker:
    """Rolls out with the deployed sampler and has the answers judged."""

    def __init__(
        self, config: RefineConfig, source: TaskSource, tokenizer: Tokenizer, generate: Generate, verify: Verify
    ) -> None:  # fmt: skip
        self._config, self._source, self._tokenizer = config, source, tokenizer
        self._generate, self._verify = generate, verify

    def make(self, step: int, threshold: float, done: float) -> Batch:
        """`group_size` rollouts of each of the step's tasks, every one with a seed of its own.

        Raises:
            FewstepError: the verifier itself failed too often.
        """
        config = self._config
        asked = self._source.draw(step, config.prompts_per_step)
        policy = rollout_policy(config, threshold)
        requests, tasks = [], []
        for prompt, one in enumerate(asked):
            for sample in range(config.group_size):
                seed = derive_seed("rollout", config.seed, step, prompt, sample)
                own = policy.model_copy(update={"seed": seed})
                requests.append(one.request(f"{step}-{prompt}-{sample}", own))
                tasks.append(one.task)
        found = answer(
            tasks, requests, self._generate, self._verify, self._tokenizer, self._source.answers,
            what="rollouts", forgiven=_FORGIVEN,
        )  # fmt: skip
        rollouts = [
            Rollout(
                task_id=task.task_id, group_id=index // config.group_size, sample=index % config.group_size,
                text=text, trajectory=trajectory, verdict=verdict, reward=0.0,
            )
            for index, (task, text, trajectory, verdict) in enumerate(found.rows())
        ]  # fmt: skip
        prompts = {one.task.task_id: one.task.prompt for one in asked}
        return Batch(rollouts, prompts, threshold, done, found.windows)


def rollout_policy(config: RefineConfig, threshold: float) -> DecodePolicy:
    """The deployed sampler at the curriculum's threshold."""
    return DecodePolicy(kind="threshold", threshold=round(threshold, 6), temperature=config.temperature)


class _InTurn:
    """Nothing runs beside the loop: a push and a look happen when they are asked for."""

    def __init__(self, push: Push) -> None:
        self._push = push

    def push(self, state: State, version: WeightVersion) -> Metrics:
        return dict(self._push(state, version))

    def between(self, work: Callable[[], Result]) -> Result:
        return work()

    def close(self) -> None:
        pass


class MadeNow(_InTurn):
    """Synchronous: a batch is made when it is asked for, by the newest weights."""

    def __init__(self, maker: RolloutMaker, push: Push) -> None:
        super().__init__(push)
        self._maker = maker

    def take(self, step: int, threshold: float, done: float) -> Batch:
        return self._maker.make(step, threshold, done)


class MadeAhead:
    """Batches are made by a thread while earlier ones train.

    The batch of step s is made by the weights that step s - `staleness` began with, no older and no newer: batches and
    pushes go through one queue in a fixed order, so a run stays a function of its configuration. Where the trainer is
    the slower one the thread waits; no rollout is thrown away.
    """

    def __init__(self, maker: RolloutMaker, push: Push, staleness: int, last_step: int) -> None:
        self._maker, self._push, self._staleness, self._last_step = maker, push, staleness, last_step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._made: dict[int, Future[Batch]] = {}
        self._pushes: list[Future[Metrics]] = []
        self._next: int | None = None

    def take(self, step: int, threshold: float, done: float) -> Batch:
        start = step if self._next is None else self._next
        self._next = max(start, min(step + self._staleness + 1, self._last_step))
        for ahead in range(start, self._next):
            self._made[ahead] = self._thread.submit(self._maker.make, ahead, threshold, done)
        return self._made.pop(step).result()

    def push(self, state: State, version: WeightVersion) -> Metrics:
        """Returns the metrics of the newest push that is over; a failed one is raised here or by the next call."""
        self._pushes.append(self._thread.submit(lambda: dict(self._push(state, version))))
        metrics: Metrics = {}
        while self._pushes and self._pushes[0].done():
            metrics = self._pushes.pop(0).result()
        return metrics

    def between(self, work: Callable[[], Result]) -> Result:
        return self._thread.submit(work).result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class Recorded(_InTurn):
    """Batches that an earlier run wrote; what is pushed still reaches the engines, which measure it."""

    def __init__(self, folder: Path, push: Push) -> None:
        super().__init__(push)
        self._folder = folder

    def take(self, step: int, threshold: float, done: float) -> Batch:
        path = rollout_file(self._folder, step)
        facts = read_metadata(path)
        return Batch(read_rollouts(path), facts["prompts"], facts["threshold"], facts["share_done"])


def rollout_file(folder: Path, step: int) -> Path:
    """The file of a step's batch."""
    return folder / f"step_{step:05d}.parquet"


def check_recorded(folder: Path, steps: int) -> list[Path]:
    """The files of a replay, before anything is started.

    Raises:
        UserError: a step's file is absent, is none, or does not say what a replay needs.
    """
    files = [rollout_file(folder, step) for step in range(steps)]
    for path in files:
        if missing := {"threshold", "share_done", "prompts"} - read_metadata(path).keys():
            raise UserError(
                str(path),
                f"no {', '.join(sorted(missing))}",
                "rollouts of `fewstep refine`",
                "record them again",
            )
    return files
