"""CanItEdit (Cassano et al. 2023, 2312.12450): 105 Python programs to be changed as an instruction says.

The whole new program is the answer. Tests are statements behind it, in its process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.pipelines.tasks.answer_format import CHAT, AnswerFormat, as_it_is
from fewstep.pipelines.tasks.benchmark import (
    BadRow,
    Benchmark,
    Row,
    find_file,
    make_tasks,
    read_rows,
    text_of,
)
from fewstep.pipelines.tasks.bigcodebench import missing_libraries
from fewstep.platform.records import Check, Task

FILES = ("*[cC]an[iI]t[eE]dit*.jsonl", "*[cC]an[iI]t[eE]dit*.jsonl.gz", "test.jsonl")
TIMEOUT_S = 30.0
STOPS = ("## Code After:", "## Instruction:", "## Code Before:", "## Test Case:", "## Explanation:")
DIRECT = AnswerFormat(lambda task: STOPS, as_it_is, "text up to the next heading")


def load(
    path: Path | None, variant: str = "descriptive", *, chat: bool = False, limit: int | None = None
) -> Benchmark:
    """The tasks of a file.

    Args:
        variant: which instruction: descriptive or lazy.
    Raises:
        TaskFileError: a file that cannot be used.
    """
    rows = read_rows([find_file(path, FILES, "canitedit")])
    tasks, excluded = make_tasks(rows, lambda row: _task(row, variant, chat), limit)
    answers = CHAT if chat else DIRECT
    return Benchmark(f"canitedit_{variant}", tasks, rows.source, rows.digest, answers, excluded, chat=chat)


def _task(row: Row, variant: str, chat: bool) -> Task:
    before, instruction = text_of(row, "before"), text_of(row, f"instruction_{variant}")
    tests = text_of(row, "tests")
    taxonomy: dict[str, Any] = row.get("taxonomy") or {}
    # A list in the release, one text in some copies of it.
    libraries = taxonomy.get("libraries") or taxonomy.get("library") or []
    libraries = libraries.split(",") if isinstance(libraries, str) else libraries
    if missing := missing_libraries([name.strip().lower() for name in libraries if name.strip()]):
        raise BadRow(f"needs {', '.join(missing)}, which this Python has not got")
    if chat:
        prompt = (
            f"## Code Before\n```py\n{before}\n```\n\n## Instruction\n{instruction}\n\n## Code After\n"
            "Answer with the whole changed program in one code block.\n"
        )
    else:
        prompt = f"## Code Before:\n{before}\n## Instruction:\n{instruction}\n## Code After:\n"
    return Task(
        task_id=str(row.get("full_name") or row["id"]),
        prompt=prompt,
        check=Check("source", str(row.get("name", "")), test_code=tests),
        timeout_s=TIMEOUT_S,
        canonical_solution=row.get("after") or "",
        tags={"change_kind": str(taxonomy.get("change_kind", ""))},
        header="",
    )
