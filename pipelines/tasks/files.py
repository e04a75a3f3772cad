"""Task files: JSON Lines, one task a line.

    {"task_id": "double", "prompt": "def double(x):\\n", "canonical_solution": "    return 2 * x\\n",
     "check": {"kind": "call", "entry_point": "double", "inputs": [[1], [2.5]], "expected": [2, 5.0]},
     "timeout_s": 2.0, "tags": {"family": "toy"}}

A `script` check has `test_code` instead of `inputs` and `expected`; a `stdin` check has inputs `[["text"]]` and expected
`["printed text"]`; a `source` check has `test_code` and a `language` (or a `module` that Python's tests import). A
`reference` check executes nothing: another verifier holds the answer against `canonical_solution` or `tags`. A task may
have a `header` (what stands before the answer, where that is not the prompt) and a `suffix`. Values are JSON; what JSON lacks (tuples, sets, bytes,
...) is written as actors/sandbox/values.py does: `{"$tuple": [1, 2]}`. Types matter: 1, 1.0 and true are three answers.
Blank lines are skipped; every other line must be a whole, valid task with an id of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fewstep.actors.sandbox import values
from fewstep.actors.sandbox.languages import LANGUAGES
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.errors import TaskFileError
from fewstep.platform.records import Check, CheckKind, Task
from fewstep.platform.registry import nearest


class _CheckLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kind: CheckKind
    entry_point: str = Field(default="answer", pattern=r"^[A-Za-z_]\w*$")
    inputs: list[list[Any]] = []
    expected: list[Any] = []
    test_code: str = ""
    parts: list[str] = Field(default=["check"], min_length=1)
    language: str = "python"
    module: str = Field(default="", pattern=r"^([A-Za-z_]\w*)?$")

    @model_validator(mode="after")
    def _one_form(self) -> _CheckLine:
        if self.kind in ("call", "stdin"):
            self._compares()
        elif self.inputs or self.expected:
            raise ValueError("inputs and expected belong to kind=call or stdin")
        elif self.kind == "reference":
            if self.test_code:
                raise ValueError("test_code belongs to kind=script or source")
        elif self.kind == "script":
            self._defines_its_parts()
        elif not self.test_code.strip():
            raise ValueError("kind=source needs test_code")
        if self.kind != "reference" and "entry_point" not in self.model_fields_set:
            raise ValueError(f"kind={self.kind} needs entry_point")
        if self.kind != "source" and (self.language != "python" or self.module):
            raise ValueError("language and module belong to kind=source")
        if self.language not in LANGUAGES:
            raise ValueError(f"unknown language {self.language}{nearest(self.language, sorted(LANGUAGES))}")
        if self.module and self.language != "python":
            raise ValueError("module belongs to language=python")
        return self

    def _compares(self) -> None:
        if not self.inputs or len(self.inputs) != len(self.expected):
            raise ValueError(
                f"{len(self.inputs)} inputs and {len(self.expected)} expected values; equally many, at least 1"
            )
        if self.test_code:
            raise ValueError("test_code belongs to kind=script or source")
        texts = [*self.expected, *(text for given in self.inputs for text in given)]
        single = all(len(given) == 1 for given in self.inputs)
        if self.kind == "stdin" and not (single and all(isinstance(text, str) for text in texts)):
            raise ValueError("an input of kind=stdin is a list of one text, what is expected is a text")

    def _defines_its_parts(self) -> None:
        try:
            compile(self.test_code, "test_code", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"test_code does not compile: {error}") from error
        for part in self.parts:
            if part not in self.test_code:
                raise ValueError(f"test_code does not define {part}(candidate)")


class _TaskLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    task_id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    check: _CheckLine
    timeout_s: float = Field(default=2.0, gt=0.0, le=600.0)
    canonical_solution: str = ""
    tags: dict[str, str] = {}
    header: str | None = None
    suffix: str = ""


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
        parts=tuple(row.check.parts),
        language=row.check.language,
        module=row.check.module,
    )
    return Task(
        task_id=row.task_id,
        prompt=row.prompt,
        check=check,
        timeout_s=row.timeout_s,
        canonical_solution=row.canonical_solution,
        tags=dict(row.tags),
        header=row.header,
        suffix=row.suffix,
    )


def _to_json(task: Task) -> dict[str, Any]:
    check: dict[str, Any] = {"kind": task.check.kind, "entry_point": task.check.entry_point}
    if task.check.kind == "reference":
        pass
    elif task.check.kind in ("call", "stdin"):
        check["inputs"] = [[values.encode(value) for value in arguments] for arguments in task.check.inputs]
        check["expected"] = [values.encode(value) for value in task.check.expected]
    else:
        check["test_code"] = task.check.test_code
    for name in ("parts", "language", "module"):
        if getattr(task.check, name) != Check.__dataclass_fields__[name].default:
            check[name] = getattr(task.check, name)
    return {
        "task_id": task.task_id,
        "prompt": task.prompt,
        "check": check,
        "timeout_s": task.timeout_s,
        "canonical_solution": task.canonical_solution,
        "tags": task.tags,
        "header": task.header,
        "suffix": task.suffix,
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
