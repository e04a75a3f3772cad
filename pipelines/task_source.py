"""What a refinement trains on and what it is measured by: two sides of tasks that share nothing.

The embedded family is a stream, split by a hash of the specification. Any other choice is a set of tasks: the held-out
side is a file of its own, or a share taken by a hash of each task's name, so that adding tasks moves none across.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.verifier import Verifier
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.frontier import SEQUENTIAL
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.tasks.answer_format import AnswerFormat
from fewstep.pipelines.tasks.benchmark import Benchmark, Exclusion, unrunnable
from fewstep.pipelines.tasks.benchmarks import load_benchmark
from fewstep.pipelines.tasks.choice import BenchmarkChoice
from fewstep.pipelines.tasks.family import draw_specification
from fewstep.pipelines.tasks.family import tasks as family_tasks
from fewstep.pipelines.tasks.prepared import Prepared, prompt_tokens
from fewstep.platform.errors import ConfigError, RequestError, TaskFileError
from fewstep.platform.records import Task
from fewstep.platform.rng import derive_seed, generator

HELD_OUT_SEED = 0
_SHOWN = 5


@dataclass(frozen=True)
class TaskSet:
    """One side.

    Attributes:
        name: as the tracker knows it.
        digest: hexadecimal, of what is in it.
        origin: where it came from, for humans.
        profile: sizes.
    """

    name: str
    digest: str
    origin: str
    profile: Mapping[str, int]

    @property
    def reference(self) -> str:
        """`NAME:DIGEST`, shortened."""
        return f"{self.name}:{self.digest[:16]}"


@dataclass(frozen=True)
class TaskSource:
    """Both sides in the model's tokens.

    Attributes:
        draw: (step, how many) to distinct tasks of the training side; a function of its arguments.
        held_out: what the frontier is measured on, before and after.
        watched: what is looked at during training; none of `held_out` and none of the training side.
        answers: how answers are read.
        excluded: tasks of either side that were left out, and why.
    """

    draw: Callable[[int, int], list[Prepared]]
    held_out: tuple[Prepared, ...]
    watched: tuple[Prepared, ...]
    answers: AnswerFormat
    training_set: TaskSet
    held_out_set: TaskSet
    excluded: tuple[Exclusion, ...] = ()

    @property
    def digests(self) -> dict[str, str]:
        """`held_out` and `training`, as `NAME:DIGEST`."""
        return {"held_out": self.held_out_set.reference, "training": self.training_set.reference}


def state_digest(parts: Iterable[str]) -> str:
    """A hexadecimal digest of a sequence of strings, order included."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def open_tasks(
    config: RefineConfig, model: ModelConfig, tokenizer: Tokenizer, chat: ChatTemplate, verifier: Verifier
) -> TaskSource:
    """The tasks of a configuration.

    Prints what was left out.

    Raises:
        TaskFileError: a file that cannot be used, or a side with too few tasks.
        ConfigError: tasks that cannot be refined on.
    """
    if config.tasks.name == "family":
        return _family(config, tokenizer)
    return _Sides(config, model, tokenizer, chat, verifier).source()


def draw_family(seed: int, step: int, count: int) -> list[Task]:
    """Distinct checkable tasks of the embedded family's training side, keyed by (seed, step)."""
    draws = generator("refine-tasks", seed, step)
    chosen: dict[str, Task] = {}
    while len(chosen) < count:
        specification = draw_specification(draws)
        if not specification.held_out and specification.text not in chosen and specification.is_checkable():
            chosen[specification.text] = specification.task()
    return list(chosen.values())


def prepared_plainly(tasks: Sequence[Task], tokenizer: Tokenizer, max_tokens: int) -> list[Prepared]:
    """Tasks whose prompt is continued and whose answer is the whole completion."""
    return [Prepared(task, prompt_tokens(task, tokenizer, None), (), max_tokens, ()) for task in tasks]


def _family(config: RefineConfig, tokenizer: Tokenizer) -> TaskSource:
    """The first step's draw stands for the stream in its digest; the rollouts' own is logged at the end."""
    num_watched = config.held_out_checks.num_tasks if config.held_out_checks.every else 0
    drawn = family_tasks(config.num_eval_tasks + num_watched, HELD_OUT_SEED, held_out=True)
    ready = prepared_plainly(drawn, tokenizer, config.max_tokens)
    first = draw_family(config.seed, 0, config.prompts_per_step)
    held_out = drawn[: config.num_eval_tasks]
    benchmark = load_benchmark(BenchmarkChoice(name="family", num_tasks=1))
    return TaskSource(
        draw=lambda step, count: prepared_plainly(
            draw_family(config.seed, step, count), tokenizer, config.max_tokens
        ),
        held_out=tuple(ready[: config.num_eval_tasks]),
        watched=tuple(ready[config.num_eval_tasks :]),
        answers=benchmark.answers,
        training_set=TaskSet(
            "family-training",
            state_digest([f"seed {config.seed}", *(task.task_id for task in first)]),
            f"specifications of the training side, keyed by (seed {config.seed}, step)",
            {"prompts_per_step": config.prompts_per_step, "group_size": config.group_size},
        ),
        held_out_set=TaskSet(
            "family-held-out",
            state_digest(task.task_id for task in held_out),
            "distinct specifications of the embedded family, held out by hash",
            {"num_tasks": len(held_out)},
        ),
    )


class _Sides:
    """Both sides of a set of tasks."""

    def __init__(
        self, config: RefineConfig, model: ModelConfig, tokenizer: Tokenizer, chat: ChatTemplate, verifier: Verifier
    ) -> None:  # fmt: skip
        self._config, self._model, self._tokenizer = config, model, tokenizer
        self._chat, self._verifier = chat, verifier
        self._excluded: list[Exclusion] = []

    def source(self) -> TaskSource:
        config = self._config
        whole = self._load("tasks", config.tasks)
        if config.held_out is None:
            pool = [task for task in whole.tasks if _is_held_out(task, config.held_out_share)]
            kept = [task for task in whole.tasks if not _is_held_out(task, config.held_out_share)]
            origin = f"{whole.source}, {config.held_out_share:g} of it by a hash of each task's name"
        else:
            other = self._load("held_out", config.held_out)
            if other.answers is not whole.answers or other.chat is not whole.chat:
                raise ConfigError(
                    "held_out",
                    f"answers read as {other.answers.name!r}",
                    f"as in tasks: {whole.answers.name!r}",
                    "set chat and answers alike",
                )
            pool, kept, origin = list(other.tasks), list(whole.tasks), other.source
        held_out = self._prepare(pool, whole)
        # In the order of a hash: the first so many are a fair sample of a sorted file.
        held_out.sort(key=lambda one: derive_seed("held-out-order", one.task.task_id))
        training = self._prepare(self._apart(kept, pool), whole)
        num_watched = self._num_watched(len(held_out))
        watched, measured = (
            held_out[:num_watched],
            held_out[num_watched : num_watched + config.num_eval_tasks],
        )
        self._require(len(measured), 1, "held-out tasks")
        self._require(
            len(watched), int(config.held_out_checks.every > 0), "held-out tasks for held_out_checks"
        )
        self._require(
            len(training), config.prompts_per_step, "training tasks, one for each of prompts_per_step"
        )
        self._report(len(training), len(measured), len(watched))
        return TaskSource(
            draw=lambda step, count: draw_epochwise(training, config.seed, step, count),
            held_out=tuple(measured),
            watched=tuple(watched),
            answers=whole.answers,
            training_set=_task_set(f"{whole.name}-training", training, whole.source),
            held_out_set=_task_set(f"{whole.name}-held-out", measured, origin),
            excluded=tuple(self._excluded),
        )

    def _load(self, key: str, choice: BenchmarkChoice) -> Benchmark:
        benchmark = load_benchmark(choice)
        if benchmark.infill:
            raise ConfigError(
                key, choice.name, "tasks whose answer ends the text", "infilling is not refined on"
            )
        self._excluded += benchmark.excluded
        return benchmark

    def _apart(self, training: Sequence[Task], held_out: Sequence[Task]) -> list[Task]:
        """Training tasks that are no held-out task under this or another name."""
        names = {task.task_id for task in held_out}
        prompts = {task.prompt: task.task_id for task in held_out}
        apart = []
        for task in training:
            if task.task_id in names:
                self._excluded.append(Exclusion(task.task_id, "is held out"))
            elif task.prompt in prompts:
                self._excluded.append(
                    Exclusion(task.task_id, f"has the prompt of the held-out task {prompts[task.prompt]}")
                )
            else:
                apart.append(task)
        return apart

    def _prepare(self, tasks: Sequence[Task], benchmark: Benchmark) -> list[Prepared]:
        """Those of the tasks that the verifier can judge and the model's context has room for."""
        reasons = {one.task_id: one.reason for one in unrunnable(tasks, self._verifier)}
        chat, ready = self._chat if benchmark.chat else None, []
        for task in tasks:
            reason = reasons.get(task.task_id, "")
            one = Prepared(
                task, prompt_tokens(task, self._tokenizer, chat), (), self._config.max_tokens, benchmark.answers.stop(task),
            )  # fmt: skip
            if not reason:
                try:
                    one.request("0", SEQUENTIAL).validate(self._model)
                except RequestError as error:
                    reason = f"{error.field}: {error.got}; allowed: {error.allowed}"
            if reason:
                self._excluded.append(Exclusion(task.task_id, reason))
            else:
                ready.append(one)
        return ready

    def _num_watched(self, num_held_out: int) -> int:
        """What is looked at during training chooses the model, so it is taken from what the model is measured by."""
        checks = self._config.held_out_checks
        return min(checks.num_tasks, num_held_out // 2) if checks.every else 0

    def _require(self, got: int, needed: int, what: str) -> None:
        if got < needed:
            reasons = "; ".join(sorted({one.reason for one in self._excluded})[:3])
            raise TaskFileError(
                "tasks", f"{got} {what}", f"at least {needed}",
                "give more tasks, or change held_out_share or prompts_per_step" + (f" (left out: {reasons})" if reasons else ""),
            )  # fmt: skip

    def _report(self, num_training: int, num_measured: int, num_watched: int) -> None:
        watched = f", {num_watched} looked at during training" if num_watched else ""
        print(
            f"tasks: {num_training} to train on, {num_measured} held out{watched}, {len(self._excluded)} left out",
            flush=True,
        )
        for one in self._excluded[:_SHOWN]:
            print(f"  left out: {one.task_id}: {one.reason}", flush=True)
        if len(self._excluded) > _SHOWN:
            print(f"  and {len(self._excluded) - _SHOWN} more, in excluded.json", flush=True)


def draw_epochwise(tasks: Sequence[Prepared], seed: int, step: int, count: int) -> list[Prepared]:
    """`count` distinct tasks for a step: an epoch deals a keyed permutation out, step by step.

    What is left of an epoch after its last whole step sits that epoch out; the next permutation is another.
    """
    steps_per_epoch = len(tasks) // count
    epoch, part = divmod(step, steps_per_epoch)
    order = generator("refine-tasks", seed, epoch).permutation(len(tasks))
    return [tasks[index] for index in order[part * count : (part + 1) * count].tolist()]


def _is_held_out(task: Task, share: float) -> bool:
    return derive_seed("held-out-share", task.task_id) < share * 2**63


def _task_set(name: str, tasks: Sequence[Prepared], origin: str) -> TaskSet:
    digest = state_digest(
        part
        for one in tasks
        for part in (one.task.task_id, one.task.prompt, repr(one.task.check), one.task.canonical_solution)
    )
    return TaskSet(name, digest, origin, {"num_tasks": len(tasks)})
