"""Task files: JSON Lines, one task a line.

    {"task_id": "double", "prompt": "def double(x):\\n", "canonical_solution": "    return 2 * x\\n",
     "check": {"kind": "call", "entry_point": "double", "inputs": [[1], [2.5]], "expected": [2, 5.0]},
     "timeout_s": 2.0, "tags": {"family": "toy"}}

A `script` check has `test_code` instead of `inputs` and `expected`. Values are JSON; what JSON lacks (tuples, sets, bytes,
...) is written as actors/sandbox/values.py does: `{"$tuple": [1, 2]}`. Types matter: 1, 1.0 and true are three answers.
Blank lines are skipped; every other line must be a whole, valid task with an id of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fewstep.actors.sandbox import values
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.errors import TaskFileError
from fewstep.platform.records import Check, Task
from fewstep.platform.registry import nearest


class _CheckLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Literal["call", "script"]
    entry_point: str = Field(pattern=r"^[A-Za-z_]\w*$")
    inputs: list[list[Any]] = []
    expected: list[Any] = []
    test_code: str = ""

    @model_validator(mode="after")
    def _one_form(self) -> _CheckLine:
        if self.kind == "call":
            if not self.inputs or len(self.inputs) != len(self.expected):
                raise ValueError(
                    f"{len(self.inputs)} inputs and {len(self.expected)} expected values; equally many, at least 1"
                )
            if self.test_code:
                raise ValueError("test_code belongs to kind=script")
            return self
        if self.inputs or self.expected:
            raise ValueError("inputs and expected belong to kind=call")
        try:
            compile(self.test_code, "test_code", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"test_code does not compile: {error}") from error
        if "check" not in self.test_code:
            raise ValueError("test_code does not define check(candidate)")
        return self


class _TaskLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    task_id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    check: _CheckLine
    timeout_s: float = Field(default=2.0, gt=0.0, le=600.0)
    canonical_solution: str = ""
    tags: dict[str, str] = {}


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a file, in order.

    Raises:
        TaskFileError: no such file, no task in it, or a broken line; names the line and the reason.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskFileError(str(path), error, "a readable UTF-8 JSON Lines file", "check the path") from error
    tasks: list[Task] = []
    lines: dict[str, int] = {}
    # Not splitlines: it also splits at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            task = _parse(line)
            if task.task_id in lines:
                raise ValueError(f"task_id {task.task_id!r} is already on line {lines[task.task_id]}")
        except (ValueError, RecursionError) as error:
            raise TaskFileError(
                f"{path}, line {number}",
                _reason(error),
                "one whole task as a JSON object",
                "correct or remove the line",
            ) from error
        lines[task.task_id] = number
        tasks.append(task)
    if not tasks:
        raise TaskFileError(str(path), "no tasks", "at least one line", "check the path")
    return tasks


def write_tasks(path: Path, tasks: Sequence[Task]) -> None:
    """Writes a file that `read_tasks` gives back exactly.

    Raises:
        values.NotPlainData: an input or an expected value is not plain data.
    """
    lines = [json.dumps(_to_json(task), ensure_ascii=False) for task in tasks]
    atomic_write_text(path, "".join(line + "\n" for line in lines))


def _parse(line: str) -> Task:
    row = _TaskLine.model_validate(json.loads(line))
    check = Check(
        kind=row.check.kind,
        entry_point=row.check.entry_point,
        inputs=tuple(tuple(values.decode(value) for value in arguments) for arguments in row.check.inputs),
        expected=tuple(values.decode(value) for value in row.check.expected),
        test_code=row.check.test_code,
    )
    return Task(row.task_id, row.prompt, check, row.timeout_s, row.canonical_solution, dict(row.tags))


def _to_json(task: Task) -> dict[str, Any]:
    check: dict[str, Any] = {"kind": task.check.kind, "entry_point": task.check.entry_point}
    if task.check.kind == "call":
        check["inputs"] = [[values.encode(value) for value in arguments] for arguments in task.check.inputs]
        check["expected"] = [values.encode(value) for value in task.check.expected]
    else:
        check["test_code"] = task.check.test_code
    return {
        "task_id": task.task_id,
        "prompt": task.prompt,
        "check": check,
        "timeout_s": task.timeout_s,
        "canonical_solution": task.canonical_solution,
        "tags": task.tags,
    }


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [*_TaskLine.model_fields, *_CheckLine.model_fields]
        return f"unknown key {where}" + nearest(str(first["loc"][-1]), known)
    return f"{where}: {first['msg']}" if where else str(first["msg"])
