"""What a benchmark is once it is loaded: tasks, how their answers are read, and the rows that were left out, by name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.actors.verifier import Verifier
from fewstep.pipelines.tasks.answer_format import AnswerFormat
from fewstep.platform.artifacts import file_digest
from fewstep.platform.errors import TaskFileError
from fewstep.platform.records import Task

Row = dict[str, Any]
_NAMES = ("task_id", "question_id", "full_name")  # columns that published files name their rows by


class BadRow(ValueError):
    """A row that cannot be a task; the message says why."""


@dataclass(frozen=True)
class Exclusion:
    """A task that is not measured, and why. It is in no denominator, and in every report."""

    task_id: str
    reason: str


@dataclass(frozen=True)
class Benchmark:
    """Tasks of one benchmark.

    Attributes:
        name: as the report calls it, such as `humaneval` or `mbxp`.
        source: the file or package the rows came from.
        digest: SHA-256 of what was read.
        answers: how a completion is stopped and read.
        excluded: rows of the source that are no tasks.
        infill: the answer stands between `Task.prompt` and `Task.suffix`.
        chat: prompts are user messages, for the model's chat template.
        sound: every published solution is known to pass its own tests; where one does not, we are wrong.
        first_test: name of a verdict's first test where it is a score of its own; "" = it is none.
    """

    name: str
    tasks: tuple[Task, ...]
    source: str
    digest: str
    answers: AnswerFormat
    excluded: tuple[Exclusion, ...] = ()
    infill: bool = False
    chat: bool = False
    sound: bool = False
    first_test: str = ""


@dataclass(frozen=True)
class Rows:
    """Rows of one or more files: (name of the row for humans, row), and the lines that are none."""

    rows: tuple[tuple[str, Row], ...]
    bad: tuple[Exclusion, ...]
    source: str
    digest: str


def find_files(path: Path | None, patterns: Sequence[str], what: str) -> list[Path]:
    """The published files of a benchmark: `path` itself, or what in the folder `path` has one of these names.

    Raises:
        TaskFileError: no path, or nothing there; says which names are looked for.
    """
    wanted = " or ".join(patterns)
    if path is None:
        raise TaskFileError(f"{what}: path", "nothing", f"{wanted}, or a folder with it", "set path")
    if path.is_file():
        return [path]
    found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    if not found:
        raise TaskFileError(f"{what}: path", path, f"{wanted}, or a folder with it", "check the path")
    return found


def find_file(path: Path | None, patterns: Sequence[str], what: str) -> Path:
    """The one file of a benchmark. Raises TaskFileError as `find_files`, and where a folder has several."""
    found = find_files(path, patterns, what)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise TaskFileError(f"{what}: path", f"{len(found)} files: {names}", "one of them", "name the file")
    return found[0]


def read_rows(files: Sequence[Path]) -> Rows:
    """Rows of .jsonl, .json (a list, or a mapping of rows) and their .gz forms.

    A line that is not a JSON object is listed, not fatal: published files have them.

    Raises:
        TaskFileError: a file that cannot be read, or has not a single row.
    """
    rows: list[tuple[str, Row]] = []
    bad: list[Exclusion] = []
    for file in files:
        before = len(rows)
        for where, row in _parse(file):
            if isinstance(row, dict):
                rows.append((where, row))
            else:
                bad.append(Exclusion(where, f"not a JSON object: {row}"))
        if len(rows) == before:
            raise TaskFileError(str(file), "no rows", "at least one JSON object", "check the path")
    digests = [file_digest(file) for file in files]
    digest = digests[0] if len(digests) == 1 else "+".join(value[:16] for value in digests)
    return Rows(tuple(rows), tuple(bad), ", ".join(file.name for file in files), digest)


def _parse(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TaskFileError(
            str(file), error, "a readable UTF-8 JSON file, perhaps gzipped", "check the path"
        ) from error
    if file.name.removesuffix(".gz").endswith(".json"):
        try:
            whole = json.loads(text)
        except ValueError as error:
            raise TaskFileError(str(file), error, "one JSON list or mapping", "check the path") from error
        rows = whole.values() if isinstance(whole, dict) else whole
        yield from ((f"{file.name}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{file.name}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{file.name}, line {number}", str(error)


def make_tasks(
    rows: Rows, make: Callable[[Row], Task], limit: int | None = None
) -> tuple[tuple[Task, ...], tuple[Exclusion, ...]]:
    """One task a row, in order; what makes none is listed with its reason.

    Args:
        make: raises BadRow (or what a row of other types leads to) where a row is no task.
        limit: stop after so many tasks.
    """
    tasks: dict[str, Task] = {}
    excluded = list(rows.bad)
    for where, row in rows.rows:
        if limit is not None and len(tasks) >= limit:
            break
        name = str(next((row[key] for key in _NAMES if key in row), where))
        try:
            task = make(row)
            if task.task_id in tasks:
                raise BadRow("a task of this name came before it")
            tasks[task.task_id] = task
        except KeyError as error:
            excluded.append(Exclusion(name, f"has no {error.args[0]}"))
        except (ValueError, TypeError, AttributeError) as error:
            excluded.append(Exclusion(name, str(error)))
    return tuple(tasks.values()), tuple(excluded)


def unrunnable(tasks: Sequence[Task], verifier: Verifier) -> list[Exclusion]:
    """The tasks that the verifier's judge is unfit for, or that are in languages whose programs it cannot execute, each
    with the reason."""
    languages = sorted({task.check.language for task in tasks if task.check.executes})
    missing = verifier.missing(languages) if languages else {}
    excluded = []
    for task in tasks:
        reason = verifier.judge.unfit(task)
        if not reason and task.check.executes:
            reason = missing.get(task.check.language, "")
        if reason:
            excluded.append(Exclusion(task.task_id, reason))
    return excluded


def text_of(row: Row, key: str, *, empty: bool = False) -> str:
    """A text column. Raises BadRow where it is absent, no text or (unless allowed) blank."""
    value = row.get(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise BadRow(f"has no {key}")
    return value
