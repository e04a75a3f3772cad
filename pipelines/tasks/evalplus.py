"""HumanEval+ and MBPP+ (EvalPlus, Liu et al. 2023, 2305.01210): the release's JSONL form.

Every row has inputs, base and plus, and a reference solution that says what is right for them. The reference runs where
the program cannot reach it: in the check's own process. The two sets of inputs are two tests of a verdict, so that the
base score and the plus score come out of one run.
"""

from __future__ import annotations

import ast
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.pipelines.tasks.answer_format import CHAT, PYTHON, parse_quietly
from fewstep.pipelines.tasks.benchmark import (
    BadRow,
    Benchmark,
    Row,
    find_file,
    make_tasks,
    read_rows,
    text_of,
)
from fewstep.pipelines.tasks.humaneval import in_chat
from fewstep.platform.records import Check, Task

FILES = {
    "humaneval_plus": ("HumanEvalPlus*.jsonl.gz", "HumanEvalPlus*.jsonl"),
    "mbpp_plus": ("MbppPlus*.jsonl.gz", "MbppPlus*.jsonl"),
}
TIMEOUT_S = 60.0
"""Over a thousand calls of a task happen; the release allows as much."""
PARTS = ("check_base", "check_plus")
_ASK = "Solve the following task in Python. Answer with the whole function in one code block.\n\n"
# Ill-posed rows: the release also lets pass what always answers so.
_ALSO_RIGHT: dict[str, Any] = {"are_equivalent": True, "sum_div": 0}
_RELATIVE_TOLERANCE = 1e-7

_TESTS = """\
import copy
import math

{solution}

reference = {entry_point}
nan, inf = float("nan"), float("inf")
INPUTS = {inputs}
ATOL, ALSO_RIGHT = {atol!r}, {also_right!r}


def numbers(value):
    return [value] if isinstance(value, (int, float, complex)) else [n for item in value for n in numbers(item)]


def is_float(value):
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def right(got, expected, arguments):
    if reference.__name__ == "find_zero":
        return abs(sum(c * math.pow(got, i) for i, c in enumerate(arguments[0]))) <= ATOL
    if got == expected:
        return True
    atol = ATOL or (1e-6 if is_float(expected) else 0)
    if not atol:
        return False
    pairs = zip(numbers(got), numbers(expected), strict=True)
    return all(abs(a - b) <= atol + {rtol} * abs(b) for a, b in pairs)


def run(candidate, inputs):
    all_right, all_the_same = True, ALSO_RIGHT is not None
    for arguments in inputs:
        got = candidate(*copy.deepcopy(arguments))
        all_right = all_right and right(got, reference(*copy.deepcopy(arguments)), arguments)
        all_the_same = all_the_same and got == ALSO_RIGHT
        assert all_right or all_the_same, arguments


def check_base(candidate):
    run(candidate, INPUTS[0])


def check_plus(candidate):
    run(candidate, INPUTS[1])
"""


def load(name: str, path: Path | None, *, chat: bool = False, limit: int | None = None) -> Benchmark:
    """The tasks of a release file.

    Args:
        name: humaneval_plus or mbpp_plus.
    Raises:
        TaskFileError: a file that cannot be used.
    """
    rows = read_rows([find_file(path, FILES[name], name)])

    def make(row: Row) -> Task:
        task = _task(row, continues=name == "humaneval_plus")
        if not chat:
            return task
        if name == "humaneval_plus":
            return in_chat(task, _ASK)
        return replace(task, prompt=f"{_ASK}{task.prompt}")

    tasks, excluded = make_tasks(rows, make, limit)
    answers = CHAT if chat else PYTHON
    return Benchmark(
        name, tasks, rows.source, rows.digest, answers, excluded, chat=chat, sound=True, first_test="base"
    )


def _task(row: Row, *, continues: bool) -> Task:
    prompt, entry_point = text_of(row, "prompt"), text_of(row, "entry_point")
    solution = text_of(row, "canonical_solution")
    whole = prompt + solution if continues else solution
    base, plus = row["base_input"], row["plus_input"]
    if not isinstance(base, list) or not isinstance(plus, list) or not base:
        raise BadRow("has no tests")
    if not continues:
        base, plus = (retyped(inputs, row.get("assertion", ""), entry_point) for inputs in (base, plus))
    tests = _TESTS.format(
        solution=whole, entry_point=entry_point, inputs=repr((base, plus)),
        atol=row.get("atol", 0), also_right=_ALSO_RIGHT.get(entry_point), rtol=_RELATIVE_TOLERANCE,
    )  # fmt: skip
    return Task(
        task_id=text_of(row, "task_id"),
        prompt=prompt,
        check=Check("script", entry_point, test_code=tests, parts=PARTS if plus else PARTS[:1]),
        timeout_s=TIMEOUT_S,
        canonical_solution=solution,
        tags={"family": "evalplus"},
        header=None if continues else "",
    )


def retyped(inputs: list[Any], assertions: str, entry_point: str) -> list[Any]:
    """JSON inputs with the types that the row's own assertions give their arguments: tuples, sets, complex numbers."""
    try:
        calls = [
            node
            for node in ast.walk(parse_quietly(assertions))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == entry_point
        ]
    except SyntaxError:
        return inputs
    if not calls:
        return inputs
    shapes = calls[0].args
    return [
        [_as(shapes[i], value) if i < len(shapes) else value for i, value in enumerate(arguments)]
        for arguments in inputs
    ]


def _as(shape: ast.expr, value: Any) -> Any:
    if isinstance(shape, ast.Constant) and isinstance(value, str) and isinstance(shape.value, int | complex):
        with suppress(ValueError):  # JSON has no complex numbers; the release writes them as text
            return complex(value)
    if isinstance(shape, ast.Dict) and isinstance(value, dict) and shape.values:
        return {key: _as(shape.values[0], item) for key, item in value.items()}
    if isinstance(shape, ast.Dict) and isinstance(value, list):
        return set(value) if value else {}
    if not isinstance(shape, ast.List | ast.Tuple | ast.Set) or not isinstance(value, list):
        return value
    items = [
        _as(item_shape, item) for item_shape, item in zip(_shapes(shape, len(value)), value, strict=True)
    ]
    if isinstance(shape, ast.Set):
        return set(items)
    return tuple(items) if isinstance(shape, ast.Tuple) else items


def _shapes(shape: ast.List | ast.Tuple | ast.Set, count: int) -> list[ast.expr]:
    """A literal's items for a value of `count` items: one by one where it has as many, else all like the first."""
    if len(shape.elts) == count:
        return shape.elts
    return [shape.elts[0] if shape.elts else ast.Constant(None)] * count
