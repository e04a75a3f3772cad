"""Task files: exact round trips, and one clear line for every broken one."""

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.pipelines.tasks.files import read_tasks, write_tasks
from fewstep.pipelines.tasks.humaneval import load
from fewstep.platform.errors import TaskFileError
from fewstep.platform.records import Check, Task

CALL = Task(
    "mixed",
    'def f(x):\n    """Ünïcode \u2028 and a line separator."""\n',
    Check(
        "call", "f", inputs=(((1, 2), {3: {4}}), ([1.0, None, True],)), expected=(b"x", {"a": float("inf")})
    ),
    timeout_s=0.5,
    canonical_solution="    return x\n",
    tags={"family": "toy"},
)


OTHERS = [
    Task("perl", "sub f {\n", Check("source", "f", test_code="die unless f(1) == 1;", language="perl")),
    Task("module", "Write f.", Check("source", "f", test_code="from answer import f\n", module="answer"), header=""),
    Task("prints", "Read a number.", Check("stdin", "main", inputs=(("1\n",),), expected=("2\n",)), header="import sys\n"),
    Task("hole", "def f(x):\n", Check("script", "f", test_code="def a(c): c(1)\ndef b(c): c(2)", parts=("a", "b")), suffix="    return y\n"),
]  # fmt: skip


def good(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task_id": "double",
        "prompt": "def f(x):\n",
        "check": {"kind": "call", "entry_point": "f", "inputs": [[1]], "expected": [2]},
    }
    return {**row, **changes}


def test_tasks_survive_the_round_trip(tmp_path: Path) -> None:
    tasks = [CALL, *OTHERS, *load().tasks[:20]]
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    assert read_tasks(tmp_path / "tasks.jsonl") == tasks


def test_defaults_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n" + json.dumps(good()) + "\n\n")
    assert read_tasks(path) == [
        Task("double", "def f(x):\n", Check("call", "f", inputs=((1,),), expected=(2,)))
    ]


def check(**changes: Any) -> dict[str, Any]:
    return good(check={**good()["check"], **changes})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ("[1]", "dictionary"),
        ("[" * 100_000, "recursion"),
        (json.dumps(good(promt="x")), r"unknown key promt \(did you mean prompt\?\)"),
        (
            json.dumps(
                good(check={"kind": "source", "entry_point": "f", "test_code": "x", "language": "pearl"})
            ),
            r"unknown language pearl \(did you mean perl\?\)",
        ),
        (json.dumps(good(check={"kind": "source", "entry_point": "f"})), "kind=source needs test_code"),
        (
            json.dumps(
                good(
                    check={
                        "kind": "source",
                        "entry_point": "f",
                        "test_code": "x",
                        "language": "perl",
                        "module": "m",
                    }
                )
            ),
            "module belongs to language=python",
        ),
        (json.dumps(check(language="perl")), "language and module belong to kind=source"),
        (json.dumps(check(kind="stdin")), "an input of kind=stdin is a list of one text"),
        (
            json.dumps(
                good(
                    check={
                        "kind": "script",
                        "entry_point": "f",
                        "test_code": "def check(c): pass",
                        "parts": ["more"],
                    }
                )
            ),
            r"does not define more\(candidate\)",
        ),
        (json.dumps(check(expectd=[1])), r"unknown key check.expectd \(did you mean expected\?\)"),
        (json.dumps(good(task_id="")), "task_id"),
        (json.dumps(good(timeout_s=0)), "timeout_s"),
        (json.dumps(good(timeout_s="2")), "timeout_s"),
        (json.dumps({"task_id": "a", "prompt": "b"}), "check: Field required"),
        (json.dumps(check(kind="shell")), "check.kind"),
        (json.dumps(check(entry_point="f()")), "check.entry_point"),
        (json.dumps(check(inputs=[])), "0 inputs and 1 expected"),
        (json.dumps(check(expected=[1, 2])), "1 inputs and 2 expected"),
        (json.dumps(check(inputs=[1])), "check.inputs.0"),
        (json.dumps(check(inputs=[[{"$pickle": "x"}]])), "unknown tag"),
        (json.dumps(check(test_code="def check(f): pass")), "test_code belongs to kind=script"),
        (
            json.dumps(good(check={"kind": "script", "entry_point": "f", "test_code": "def check(:"})),
            "does not compile",
        ),
        (
            json.dumps(good(check={"kind": "script", "entry_point": "f", "test_code": "pass"})),
            "does not define",
        ),
        (
            json.dumps(good(check={"kind": "script", "entry_point": "f", "inputs": [[1]]})),
            "belong to kind=call",
        ),
        (json.dumps(good(task_id="first")), "already on line 1"),
    ],
)
def test_a_broken_line_is_named_with_its_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(good(task_id="first")) + "\n" + line + "\n")
    with pytest.raises(TaskFileError, match=reason) as caught:
        read_tasks(path)
    assert f"{path}, line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_empty_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match="No such file"):
        read_tasks(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(TaskFileError, match="no tasks"):
        read_tasks(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskFileError, match="UTF-8"):
        read_tasks(tmp_path / "binary.jsonl")


def test_what_is_not_plain_data_is_not_written(tmp_path: Path) -> None:
    task = Task("odd", "def f(x):\n", Check("call", "f", inputs=((object(),),), expected=(1,)))
    with pytest.raises(ValueError, match="plain data"):
        write_tasks(tmp_path / "tasks.jsonl", [task])
    assert list(tmp_path.iterdir()) == []
