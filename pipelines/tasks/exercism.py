"""Exercism's Python track as Aider's benchmark uses it: a folder of exercises, each with instructions, a stub and tests.

    EXERCISE/.docs/instructions.md (and instructions.append.md), EXERCISE/NAME.py, EXERCISE/NAME_test.py,
    EXERCISE/.meta/config.json, EXERCISE/.meta/example.py

The answer is the whole file ("whole" edit format), which the tests import. One try; Aider's own score allows a second one
that sees the first one's errors.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fewstep.pipelines.tasks.answer_format import CHAT, FENCED
from fewstep.pipelines.tasks.benchmark import BadRow, Benchmark, Row, Rows, make_tasks
from fewstep.platform.errors import TaskFileError
from fewstep.platform.records import Check, Task

TIMEOUT_S = 60.0


def load(path: Path | None, *, chat: bool = False, limit: int | None = None) -> Benchmark:
    """The exercises below a folder, by name.

    Raises:
        TaskFileError: no such folder, or no exercise in it.
    """
    if path is None or not path.is_dir():
        raise TaskFileError("exercism: path", path or "nothing", "a folder of exercises", "set path")
    folders = sorted(file.parent.parent for file in path.rglob(".meta/config.json"))
    if not folders:
        raise TaskFileError("exercism: path", path, "exercises with .meta/config.json", "check the path")
    rows: list[tuple[str, Row]] = [
        (folder.name, {"task_id": folder.name, "folder": folder}) for folder in folders
    ]
    tasks, excluded = make_tasks(Rows(tuple(rows), (), "", ""), lambda row: _task(row["folder"], chat), limit)
    digest = hashlib.sha256()
    for task in tasks:
        for part in (task.task_id, task.prompt, task.check.test_code):
            digest.update(part.encode() + b"\0")
    answers = CHAT if chat else FENCED
    return Benchmark("exercism", tasks, path.name, digest.hexdigest(), answers, excluded, chat=chat)


def _task(folder: Path, chat: bool) -> Task:
    try:
        files = json.loads((folder / ".meta" / "config.json").read_text(encoding="utf-8"))["files"]
        (solution,), (tests,) = files["solution"], files["test"]
        stub, test_code = _read(folder / solution), _read(folder / tests)
    except (OSError, ValueError, KeyError) as error:
        raise BadRow(f"is no exercise of one file and one test file: {error}") from error
    if not test_code.strip():
        raise BadRow("has no tests")
    docs = [
        folder / ".docs" / name for name in ("introduction.md", "instructions.md", "instructions.append.md")
    ]
    instructions = "\n\n".join(_read(file).strip() for file in docs if file.is_file())
    if not instructions:
        raise BadRow("has no instructions")
    example = folder / (files.get("example") or [".meta/example.py"])[0]
    ask = f"{instructions}\n\nChange this file, {solution}; keep the names of its functions and classes:\n\n```python\n{stub}\n```\n\n"
    end = (
        "Answer with the whole file in one code block.\n"
        if chat
        else f"The whole of {solution}:\n\n```python\n"
    )
    return Task(
        task_id=folder.name,
        prompt=ask + end,
        check=Check("source", solution, test_code=test_code, module=Path(solution).stem),
        timeout_s=TIMEOUT_S,
        canonical_solution=_read(example) if example.is_file() else "",
        tags={"family": "exercism"},
        header="",
    )


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")
