"""From a choice in the configuration to a loaded benchmark."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

from fewstep.pipelines.tasks import (
    bigcodebench,
    canitedit,
    codeio,
    evalplus,
    exercism,
    humaneval,
    livecodebench,
    mbpp,
    mbxp,
)
from fewstep.pipelines.tasks.answer_format import CHAT, FENCED, JSON, PLAIN, PYTHON
from fewstep.pipelines.tasks.benchmark import Benchmark
from fewstep.pipelines.tasks.choice import BenchmarkChoice
from fewstep.pipelines.tasks.family import tasks as family_tasks
from fewstep.pipelines.tasks.files import read_tasks
from fewstep.platform.artifacts import file_digest
from fewstep.platform.errors import TaskFileError

DRAWN_TASKS = 500
_ANSWERS = {"plain": PLAIN, "python": PYTHON, "fenced": FENCED, "json": JSON}


def load_benchmark(choice: BenchmarkChoice) -> Benchmark:
    """Reads it, before anything is started.

    Raises:
        TaskFileError, ResourceError: a file or package that is not there or cannot be used; or no task is left.
    """
    benchmark = _LOADERS[choice.name](choice)
    if not benchmark.tasks:
        reasons = sorted({exclusion.reason for exclusion in benchmark.excluded})
        raise TaskFileError(
            f"{choice.name}: {benchmark.source}",
            f"no task; {'; '.join(reasons[:3])}",
            "at least one",
            "check the file",
        )
    return benchmark


def _family(choice: BenchmarkChoice) -> Benchmark:
    count = choice.num_tasks or DRAWN_TASKS
    tasks = tuple(family_tasks(count, choice.seed, held_out=True))
    digest = hashlib.sha256("\n".join(task.task_id for task in tasks).encode()).hexdigest()
    source = f"held-out specifications of the embedded family, seed {choice.seed}"
    return Benchmark("family", tasks, source, digest, PLAIN, sound=True)


def _tasks(choice: BenchmarkChoice) -> Benchmark:
    if choice.path is None:
        raise TaskFileError("tasks: path", "nothing", "a JSON Lines task file", "set path")
    tasks = tuple(read_tasks(choice.path))[: choice.num_tasks]
    if choice.chat:
        # The prompt is a message then, no part of the program.
        tasks = tuple(task if task.header is not None else replace(task, header="") for task in tasks)
    answers = _ANSWERS[choice.answers] if choice.answers else CHAT if choice.chat else PLAIN
    return Benchmark("tasks", tasks, choice.path.name, file_digest(choice.path), answers, chat=choice.chat)


_Loader = Callable[[BenchmarkChoice], Benchmark]
_LOADERS: dict[str, _Loader] = {
    "family": _family,
    "repair": _family,
    "tasks": _tasks,
    "humaneval": lambda c: humaneval.load(c.path, chat=c.chat, limit=c.num_tasks),
    "humaneval_plus": lambda c: evalplus.load(c.name, c.path, chat=c.chat, limit=c.num_tasks),
    "humaneval_infilling": lambda c: humaneval.load_infilling(c.path, c.chosen_variant, c.num_tasks),
    "mbpp": lambda c: mbpp.load(c.path, c.chosen_variant, chat=c.chat, limit=c.num_tasks),
    "mbpp_plus": lambda c: evalplus.load(c.name, c.path, chat=c.chat, limit=c.num_tasks),
    "mbxp": lambda c: mbxp.load(c.path, c.languages, c.num_tasks),
    "livecodebench": lambda c: livecodebench.load(
        c.path, c.first_date, c.last_date, chat=c.chat, limit=c.num_tasks
    ),
    "bigcodebench": lambda c: bigcodebench.load(c.path, chat=c.chat, limit=c.num_tasks),
    "canitedit": lambda c: canitedit.load(c.path, c.chosen_variant, chat=c.chat, limit=c.num_tasks),
    "exercism": lambda c: exercism.load(c.path, chat=c.chat, limit=c.num_tasks),
    "codeio": lambda c: codeio.load(
        c.path, "input" if c.chosen_variant == "input" else "output", c.seed, chat=c.chat, limit=c.num_tasks
    ),
}
