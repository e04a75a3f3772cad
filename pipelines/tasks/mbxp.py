"""MBXP (Athiwaratkun et al. 2023, 2210.14868): the tasks of MBPP in thirteen languages, in their published form.

One file a language. Python's tests are a `check(candidate)` function and run apart from the program; those of the other
languages assert where the program runs. Most languages have model-written reference solutions for some tasks, others
(Perl, Go, Scala, Swift) for none.
"""

from __future__ import annotations

from pathlib import Path

from fewstep.pipelines.tasks.answer_format import LANGUAGE
from fewstep.pipelines.tasks.benchmark import (
    BadRow,
    Benchmark,
    Exclusion,
    Row,
    find_files,
    make_tasks,
    read_rows,
    text_of,
)
from fewstep.platform.errors import TaskFileError
from fewstep.platform.records import Check, Task

FILES = ("*mb*_release_v*.jsonl.gz", "*mb*_release_v*.jsonl")
TIMEOUT_S = 10.0


def load(path: Path | None, languages: tuple[str, ...] = (), limit: int | None = None) -> Benchmark:
    """The tasks of one file, or of every file in a folder.

    Args:
        languages: which; empty = all that are there.
        limit: tasks a file at most.
    Raises:
        TaskFileError: no such file, or none of a language that was asked for.
    """
    files = find_files(path, FILES, "mbxp")
    parts = []
    for file in files:
        rows = read_rows([file])
        if not languages or rows.rows[0][1].get("language") in languages:
            parts.append((rows, *make_tasks(rows, task_of, limit)))
    found = {task.check.language for _, tasks, _ in parts for task in tasks}
    if missing := [language for language in languages if language not in found]:
        raise TaskFileError(
            "mbxp: languages", ", ".join(missing), ", ".join(sorted(found)) or "none", "check the path"
        )
    excluded: list[Exclusion] = [exclusion for _, _, exclusions in parts for exclusion in exclusions]
    return Benchmark(
        name="mbxp",
        tasks=tuple(task for _, tasks, _ in parts for task in tasks),
        source=", ".join(rows.source for rows, _, _ in parts),
        digest="+".join(rows.digest[:16] for rows, _, _ in parts),
        answers=LANGUAGE,
        excluded=tuple(excluded),
    )


def task_of(row: Row) -> Task:
    """One row. Raises BadRow where it has no prompt or no tests."""
    language, tests = text_of(row, "language"), text_of(row, "test")
    if language == "python" and "def check(" not in tests:
        raise BadRow("its tests define no check(candidate)")
    return Task(
        task_id=text_of(row, "task_id"),
        prompt=text_of(row, "prompt"),
        check=Check(
            "script" if language == "python" else "source",
            text_of(row, "entry_point"),
            test_code=tests,
            language=language,
        ),
        timeout_s=TIMEOUT_S,
        canonical_solution=row.get("canonical_solution") or "",
        tags={"language": language},
    )
