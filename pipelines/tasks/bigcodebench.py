"""BigCodeBench (Zhuo et al. 2024, 2406.15877): tasks over third-party libraries, each with a unittest class.

Complete: the prompt is a function with a long docstring. Instruct: a question. Tests patch and import what the program
uses, so they run in its process. Tasks whose libraries this Python has not got are excluded by name.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

from fewstep.pipelines.tasks.answer_format import CHAT, PYTHON
from fewstep.pipelines.tasks.benchmark import (
    BadRow,
    Benchmark,
    Row,
    find_file,
    make_tasks,
    read_rows,
    text_of,
)
from fewstep.platform.records import Check, Task

FILES = ("*[bB]ig[cC]ode[bB]ench*.jsonl", "*[bB]ig[cC]ode[bB]ench*.jsonl.gz")
TIMEOUT_S = 60.0
# Installed under other names than they are imported by.
_IMPORTED_AS = {
    "bs4": "bs4", "beautifulsoup4": "bs4", "pillow": "PIL", "pil": "PIL", "scikit-learn": "sklearn",
    "opencv-python": "cv2", "python-dateutil": "dateutil", "pyyaml": "yaml", "python-docx": "docx",
}  # fmt: skip


def load(path: Path | None, *, chat: bool = False, limit: int | None = None) -> Benchmark:
    """The tasks of a release file, full or hard.

    Raises:
        TaskFileError: a file that cannot be used.
    """
    rows = read_rows([find_file(path, FILES, "bigcodebench")])
    tasks, excluded = make_tasks(rows, lambda row: _task(row, chat), limit)
    name = "bigcodebench_instruct" if chat else "bigcodebench_complete"
    return Benchmark(name, tasks, rows.source, rows.digest, CHAT if chat else PYTHON, excluded, chat=chat)


def _task(row: Row, chat: bool) -> Task:
    tests, entry_point = text_of(row, "test"), text_of(row, "entry_point")
    if "unittest" not in tests:
        raise BadRow("has no unittest class")
    if missing := missing_libraries(_libraries(row)):
        raise BadRow(f"needs {', '.join(missing)}, which this Python has not got")
    complete, solution = text_of(row, "complete_prompt"), row.get("canonical_solution") or ""
    whole = (row.get("code_prompt") or complete) + solution if solution else ""
    return Task(
        task_id=text_of(row, "task_id"),
        prompt=text_of(row, "instruct_prompt") if chat else complete,
        check=Check("source", entry_point, test_code=tests),
        timeout_s=TIMEOUT_S,
        canonical_solution=whole if chat else solution,
        tags={"family": "bigcodebench"},
        header="" if chat else None,
    )


def _libraries(row: Row) -> list[str]:
    libraries = row.get("libs", [])
    try:
        # The release spells the list as text.
        return list(ast.literal_eval(libraries)) if isinstance(libraries, str) else list(libraries)
    except (ValueError, SyntaxError) as error:
        raise BadRow(f"libs is no list: {error}") from error


def missing_libraries(names: list[str]) -> list[str]:
    """Those that cannot be imported by the Python programs run under, which is this one."""
    imported = [_IMPORTED_AS.get(name.lower(), name) for name in names]
    roots = [name.split(".")[0] for name in imported]
    return sorted(
        {
            root
            for root in roots
            if root not in sys.stdlib_module_names and importlib.util.find_spec(root) is None
        }
    )
