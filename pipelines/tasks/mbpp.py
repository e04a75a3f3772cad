"""MBPP (Austin et al. 2021, 2108.07732) in the three forms it is published in: 974 short Python tasks with asserts.

The full file (`mbpp.jsonl`), the sanitized one (`sanitized-mbpp.json`, 427 tasks) and MBXP's form with
`check(candidate)`. The first two are prompted zero-shot with the text and its tests in a docstring, and the answer is the
whole module.
"""

from __future__ import annotations

import ast
from pathlib import Path

from fewstep.pipelines.tasks import mbxp
from fewstep.pipelines.tasks.answer_format import CHAT, LANGUAGE, PYTHON, AnswerFormat, parse_quietly
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

FILES = (
    "mbpp.jsonl",
    "mbpp.jsonl.gz",
    "sanitized-mbpp.json",
    "mbpp_release_v*.jsonl*",
    "mbxp-mbpp_release_v*.jsonl*",
)
TIMEOUT_S = 10.0
TEST_SPLIT = range(11, 511)
"""Ids of the 500 tasks that the paper tests on; 1 to 10 are its few-shot examples."""


def load(
    path: Path | None, variant: str = "all", *, chat: bool = False, limit: int | None = None
) -> Benchmark:
    """The tasks of a file.

    Args:
        variant: `all`, or `test` for the paper's 500.
        chat: ask for a code block, instead of continuing a docstring.
    Raises:
        TaskFileError: a file that cannot be used.
    """
    rows = read_rows([find_file(path, FILES, "mbpp")])

    def make(row: Row) -> Task:
        task = mbxp.task_of(row) if "canonical_solution" in row else _task(row, chat)
        if variant == "test" and int(task.task_id.rpartition("/")[2]) not in TEST_SPLIT:
            raise BadRow("not in the test split")
        return task

    tasks, excluded = make_tasks(rows, make, limit)
    name = "mbpp" if variant == "all" else f"mbpp_{variant}"
    in_full = "canonical_solution" not in rows.rows[0][1]
    answers: AnswerFormat = (CHAT if chat else PYTHON) if in_full else LANGUAGE
    return Benchmark(name, tasks, rows.source, rows.digest, answers, excluded, chat=chat and in_full)


def _task(row: Row, chat: bool) -> Task:
    text = text_of(row, "text" if "text" in row else "prompt").strip()
    code, tests = text_of(row, "code"), row.get("test_list")
    if not isinstance(tests, list) or not tests:
        raise BadRow("has no tests")
    setup = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", "") or ""]).strip()
    shown = "\n".join(tests)
    ask = f"{text}\nThe code must pass these tests:\n\n{shown}\n"
    return Task(
        task_id=f"MBPP/{row['task_id']}",
        prompt=f"{ask}\nAnswer with one Python code block.\n" if chat else f'"""\n{text}\n{shown}\n"""\n',
        check=check_of(code, setup, tests),
        timeout_s=TIMEOUT_S,
        canonical_solution=code.replace("\r\n", "\n"),
        tags={"family": "mbpp"},
        header="",
    )


def check_of(code: str, setup: str, tests: list[str]) -> Check:
    """Tests as a `check` of their own process; in the program's where they handle objects of its classes.

    Raises:
        BadRow: the reference solution or the tests are no Python, or the tests call nothing of it.
    """
    try:
        defined = parse_quietly(code.replace("\r\n", "\n"))
        called = parse_quietly("\n".join([setup, *tests]))
    except SyntaxError as error:
        raise BadRow(f"is not Python: {error.msg}") from error
    functions = {node.name for node in defined.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name for node in ast.walk(defined) if isinstance(node, ast.ClassDef)}
    names = [node.id for node in ast.walk(called) if isinstance(node, ast.Name)]
    entry = next((name for name in names if name in functions), None)
    if entry is None:
        raise BadRow("its tests call no function of the reference solution")
    if classes & set(names):
        return Check("source", entry, test_code="\n".join([setup, *tests]))
    body = "\n".join(f"    {line}" for test in tests for line in test.split("\n"))
    return Check("script", entry, test_code=f"{setup}\n\n\ndef check(candidate):\n{body}\n")
