"""LiveCodeBench (Jain et al. 2024, 2403.07974): contest problems by date, in the published JSONL form.

A task has example tests and hidden ones, both given as text: programs that read and print (`stdin`) or a method of
LeetCode's `Solution` (`functional`). The hidden ones of the lite release are packed: base64, zlib, and a pickle of one
string. Nothing is unpickled here; the string is read off the pickle's opcodes, and any other pickle is a bad row.
"""

from __future__ import annotations

import base64
import json
import pickletools
import zlib
from pathlib import Path
from typing import Any

from fewstep.pipelines.tasks.answer_format import CHAT, FENCED
from fewstep.pipelines.tasks.benchmark import (
    BadRow,
    Benchmark,
    Row,
    find_files,
    make_tasks,
    read_rows,
    text_of,
)
from fewstep.platform.records import Check, Task

FILES = ("test*.jsonl", "test*.jsonl.gz")
TIMEOUT_S = 6.0  # the release's own, for one test
_HARMLESS = {
    "PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
# What contest sites have loaded before a solution starts.
HEADER = (
    "".join(
        f"from {name} import *\n"
        for name in (
            "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics",
            "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing",
        )
    )
    + "import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools\n"
    + "import operator, io, sys, json\nsys.setrecursionlimit(50000)\n\n"
)  # fmt: skip
_READS = "Read the input from stdin and write the answer to stdout; do not test on the examples."
_STARTS = "Use this starter code."
_FUNCTIONAL = """\
import json

CASES = json.loads({cases!r})


def plain(value):
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def check(candidate):
    for arguments, expected in CASES:
        assert plain(candidate(*arguments)) == expected, arguments
"""


def load(
    path: Path | None, first: str = "", last: str = "", *, chat: bool = False, limit: int | None = None
) -> Benchmark:
    """The tasks of the files.

    Args:
        first, last: contest dates (YYYY-MM-DD) that bound the window, both included; empty = no bound.
    Raises:
        TaskFileError: a file that cannot be used.
    """
    rows = read_rows(find_files(path, FILES, "livecodebench"))

    def make(row: Row) -> Task:
        date = text_of(row, "contest_date")[:10]
        if (first and date < first) or (last and date > last):
            raise BadRow(f"of {date}, outside the window")
        return _task(row, date, chat)

    tasks, excluded = make_tasks(rows, make, limit)
    name = "livecodebench" + (f"_{first or 'start'}_{last or 'end'}" if first or last else "")
    answers = CHAT if chat else FENCED
    return Benchmark(name, tasks, rows.source, rows.digest, answers, excluded, chat=chat)


def _task(row: Row, date: str, chat: bool) -> Task:
    tests = [*_tests(row, "public_test_cases"), *_tests(row, "private_test_cases")]
    if not tests:
        raise BadRow("has no tests")
    kinds = {test["testtype"] for test in tests}
    if len(kinds) > 1:
        raise BadRow("mixes stdin and functional tests")
    functional = kinds == {"functional"}
    starter = row.get("starter_code") or ""
    name = json.loads(row.get("metadata") or "{}").get("func_name", "") if functional else "main"
    if not name:
        raise BadRow("does not name its function")
    return Task(
        task_id=text_of(row, "question_id"),
        prompt=_prompt(text_of(row, "question_content"), starter, chat),
        check=_functional(name, tests) if functional else _stdin(tests),
        timeout_s=TIMEOUT_S if not functional else TIMEOUT_S * min(len(tests), 10),
        tags={
            "platform": str(row.get("platform", "")),
            "difficulty": str(row.get("difficulty", "")),
            "date": date,
        },
        header=HEADER,
        suffix=f"\n\ndef {name}(*arguments):\n    return Solution().{name}(*arguments)\n"
        if functional
        else "",
    )


def _prompt(question: str, starter: str, chat: bool) -> str:
    how = f"{_STARTS}\n```python\n{starter}\n```" if starter.strip() else _READS
    text = f"### Question:\n{question}\n\n### Format: {how}\n\n"
    if chat:
        return text + "Answer with the whole program in one code block.\n"
    return text + "### Answer:\n\n```python\n"


def _tests(row: Row, key: str) -> list[dict[str, Any]]:
    text = row.get(key) or "[]"
    if not isinstance(text, str):
        raise BadRow(f"{key} is no text")
    try:
        tests = json.loads(text)
    except ValueError:
        tests = json.loads(_unpacked(text, key))
    if not isinstance(tests, list) or not all(
        {"input", "output", "testtype"} <= test.keys() for test in tests
    ):
        raise BadRow(f"{key} is no list of tests")
    return tests


def _unpacked(text: str, key: str) -> str:
    try:
        operations = list(pickletools.genops(zlib.decompress(base64.b64decode(text, validate=True))))
    except (ValueError, zlib.error) as error:
        raise BadRow(f"{key} is neither JSON nor packed JSON: {error}") from error
    strings = [argument for operation, argument, _ in operations if isinstance(argument, str)]
    if len(strings) != 1 or {operation.name for operation, _, _ in operations} - _HARMLESS:
        raise BadRow(f"{key} is a pickle of something else than one text")
    return strings[0]


def _stdin(tests: list[dict[str, Any]]) -> Check:
    inputs = tuple((str(test["input"]),) for test in tests)
    return Check("stdin", "main", inputs=inputs, expected=tuple(str(test["output"]) for test in tests))


def _functional(name: str, tests: list[dict[str, Any]]) -> Check:
    try:
        cases = [
            ([json.loads(line) for line in test["input"].split("\n")], json.loads(test["output"]))
            for test in tests
        ]
    except ValueError as error:
        raise BadRow(f"has a test that is not JSON: {error}") from error
    return Check("script", name, test_code=_FUNCTIONAL.format(cases=json.dumps(cases)))
