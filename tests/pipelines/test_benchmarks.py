"""Published formats from local files: tasks, prompts and tests that pass right answers and fail wrong ones, bad rows listed.

The files here are small ones in the published shapes; the published ones themselves are in test_published_files.py.
"""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fewstep.actors.verifier import LocalVerifier
from fewstep.pipelines.tasks import evalplus, mbpp
from fewstep.pipelines.tasks.benchmark import Benchmark
from fewstep.pipelines.tasks.benchmarks import load_benchmark
from fewstep.pipelines.tasks.choice import BenchmarkChoice
from fewstep.pipelines.tasks.codeio import package_file
from fewstep.platform.errors import ResourceError, TaskFileError
from fewstep.platform.records import Outcome, Verdict


@pytest.fixture(scope="module")
def verifier() -> Iterator[LocalVerifier]:
    with LocalVerifier() as found:
        yield found


def write(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def load(name: str, path: Path, **choice: Any) -> Benchmark:
    return load_benchmark(BenchmarkChoice.model_validate({"name": name, "path": path, **choice}))


def judge(
    verifier: LocalVerifier, benchmark: Benchmark, texts: Sequence[str], task: int = 0
) -> list[Verdict]:
    """Verdicts of completions of one task, read as the benchmark reads them."""
    chosen = benchmark.tasks[task]
    return verifier.verify([(chosen, benchmark.answers.read(chosen, text)) for text in texts])


def outcomes(verdicts: Sequence[Verdict]) -> list[Outcome]:
    return [verdict.outcome for verdict in verdicts]


def canonical(verifier: LocalVerifier, benchmark: Benchmark) -> list[Outcome]:
    answers = [(task, benchmark.answers.read(task, task.canonical_solution)) for task in benchmark.tasks]
    return outcomes(verifier.verify(answers))


HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'import math\n\n\ndef root(x):\n    return math.isqrt(x)\n\n\ndef f(x):\n    """The root, doubled."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 2 * root(x)\n",
    "test": "def check(candidate):\n    assert candidate(9) == 6\n",
}


def test_bad_rows_are_listed_and_counted(tmp_path: Path) -> None:
    rows = [
        HUMANEVAL, "{broken", "[1]", HUMANEVAL, {**HUMANEVAL, "task_id": "a", "test": "  "},
        {**HUMANEVAL, "task_id": "b", "test": "x = 1"}, {**HUMANEVAL, "task_id": "c", "prompt": 3}, {"task_id": "d"},
        {**HUMANEVAL, "task_id": "e"},
    ]  # fmt: skip
    found = load("humaneval", write(tmp_path / "HumanEval.jsonl", rows))
    assert [task.task_id for task in found.tasks] == ["HumanEval/900", "e"]
    reasons = {exclusion.task_id: exclusion.reason for exclusion in found.excluded}
    assert len(found.tasks) + len(found.excluded) == len(rows)
    assert "not a JSON object" in reasons["HumanEval.jsonl, line 2"]
    assert "not a JSON object" in reasons["HumanEval.jsonl, line 3"]
    assert reasons["HumanEval/900"] == "a task of this name came before it"
    assert (reasons["a"], reasons["c"]) == ("has no test", "has no prompt")
    assert reasons["b"] == "its tests define no check(candidate)"
    assert "has no" in reasons["d"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("HumanEval.jsonl", None, "humaneval: path: got"),
        ("HumanEval.jsonl", b"", "no rows"),
        ("HumanEval.jsonl", b"{}\n", "no task; has no"),
        ("HumanEval.jsonl.gz", b"\x1f\x8b broken", "readable UTF-8 JSON file"),
        ("HumanEval.jsonl", b"\xff\xfe", "readable UTF-8 JSON file"),
    ],
)
def test_a_file_that_is_none_is_one_clear_line(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskFileError) as caught:
        load("humaneval", tmp_path / name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_searched_for_the_published_names(tmp_path: Path) -> None:
    write(tmp_path / "HumanEval.jsonl.gz", [HUMANEVAL])
    found = load("humaneval", tmp_path)
    assert (found.source, len(found.digest)) == ("HumanEval.jsonl.gz", 64)
    write(tmp_path / "HumanEval.jsonl", [HUMANEVAL])
    with pytest.raises(TaskFileError, match=r"2 files: HumanEval\.jsonl, HumanEval\.jsonl\.gz"):
        load("humaneval", tmp_path)
    with pytest.raises(TaskFileError, match=r"HumanEvalPlus\*"):
        load("humaneval_plus", tmp_path)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"name": "humaneval", "variant": "hard"}, "not to be set"),
        ({"name": "mbpp", "variant": "hard"}, "all or test"),
        ({"name": "humaneval", "languages": ["perl"]}, "languages does nothing with humaneval"),
        ({"name": "mbxp", "chat": True}, "chat does nothing with mbxp"),
        ({"name": "family", "path": "x"}, "path does nothing with family"),
        ({"name": "mbpp", "seed": 3}, "seed does nothing with mbpp"),
        ({"name": "livecodebench", "first_date": "May"}, "pattern"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BenchmarkChoice.model_validate(choice)


def test_humaneval_in_chat_puts_imports_and_functions_back(tmp_path: Path, verifier: LocalVerifier) -> None:
    found = load("humaneval", write(tmp_path / "HumanEval.jsonl", [HUMANEVAL]), chat=True)
    (task,) = found.tasks
    assert task.header == "import math\n\n\ndef root(x):\n    return math.isqrt(x)\n\n\n"
    assert "```python\nimport math" in task.prompt
    assert found.chat
    texts = [
        "Sure:\n```python\ndef f(x):\n    return 2 * root(x)\n```\nThis doubles it.",
        "```python\ndef f(x):\n    return root(x)\n```",
        "I cannot.",
    ]
    assert outcomes(judge(verifier, found, texts)) == ["passed", "wrong_answer", "syntax_error"]
    assert canonical(verifier, found) == ["passed"]


MBPP = {
    "task_id": 11,
    "text": "Write a function to add one.",
    "code": "def one():\r\n  return 1\r\ndef add(x):\r\n  return x + one()",
    "test_setup_code": "",
    "test_list": ["assert add(1) == 2", "assert add(-1) == 0"],
    "challenge_test_list": [],
}
PAIR = {
    **MBPP, "task_id": 601, "code": "class Pair:\n  def __init__(self, a): self.a = a\ndef add(p): return p.a + 1",
    "test_setup_code": "p = Pair(1)", "test_list": ["assert add(p) == 2", "assert add(Pair(3)) == 4"],
}  # fmt: skip


def test_mbpp_in_full_form(tmp_path: Path, verifier: LocalVerifier) -> None:
    rows = [MBPP, PAIR, {**MBPP, "task_id": 12, "test_list": []}, {**MBPP, "task_id": 13, "test_list": ["assert g(1)"]},
            {**MBPP, "task_id": 14, "code": "def add(x:"}]  # fmt: skip
    found = load("mbpp", write(tmp_path / "mbpp.jsonl", rows))
    assert [task.task_id for task in found.tasks] == ["MBPP/11", "MBPP/601"]
    assert (
        found.tasks[0].prompt
        == '"""\nWrite a function to add one.\nassert add(1) == 2\nassert add(-1) == 0\n"""\n'
    )
    assert [task.check.kind for task in found.tasks] == ["script", "source"]
    assert {exclusion.reason for exclusion in found.excluded} == {
        "has no tests", "its tests call no function of the reference solution", "is not Python: '(' was never closed",
    }  # fmt: skip
    assert canonical(verifier, found) == ["passed", "passed"]
    texts = [
        "def add(x):\n    return x + 1\n\nprint(add(1))",
        "def add(x):\n    return 2\n",
        "import sys\nsys.exit(0)",
    ]
    assert outcomes(judge(verifier, found, texts)) == ["passed", "wrong_answer", "runtime_error"]
    early = judge(
        verifier, found, ["class Pair: pass\nraise SystemExit(0)", "import os\nos._exit(0)"], task=1
    )
    assert outcomes(early) == ["runtime_error", "runtime_error"]
    test_split = load("mbpp", tmp_path, variant="test")
    assert (test_split.name, [task.task_id for task in test_split.tasks]) == ("mbpp_test", ["MBPP/11"])
    assert ("601", "not in the test split") in [(one.task_id, one.reason) for one in test_split.excluded]


def test_mbpp_sanitized(tmp_path: Path, verifier: LocalVerifier) -> None:
    row = {"task_id": 2, "prompt": "Add one.", "code": MBPP["code"], "test_imports": ["import math"],
           "test_list": ["assert math.isclose(add(1), 2)"]}  # fmt: skip
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([row]))
    found = load("mbpp", tmp_path, chat=True)
    assert canonical(verifier, found) == ["passed"]
    assert "math.isclose(add(1), 2)" in found.tasks[0].prompt
    assert mbpp.check_of("def f(): return 1", "", ["assert f() == 1"]).entry_point == "f"


PLUS = {
    "task_id": "HumanEval/900", "prompt": "def f(xs):\n    \"\"\"Mean.\"\"\"\n", "entry_point": "f",
    "canonical_solution": "    xs.sort()\n    return sum(xs) / len(xs)\n", "contract": "",
    "base_input": [[[1.0, 2.0]], [[4.0]]], "plus_input": [[[0.1, 0.2, 0.3]], [[float("inf")]]], "atol": 0,
}  # fmt: skip


def test_evalplus_has_a_base_score_and_a_plus_score(tmp_path: Path, verifier: LocalVerifier) -> None:
    found = load("humaneval_plus", write(tmp_path / "HumanEvalPlus-v0.1.10.jsonl.gz", [PLUS]))
    assert canonical(verifier, found) == ["passed"]
    right, base_only, wrong, alters = judge(
        verifier,
        found,
        [
            "    return sum(xs) * (1 / len(xs)) if len(xs) < 9 else 0\n",  # rounds otherwise: floats are compared as such
            "    return sum(xs) / len(xs) if len(xs) < 3 else 0.0\n",
            "    return 0.0\n",
            "    value = sum(xs) / len(xs)\n    xs.clear()\n    return value\n",  # its own copy of the input
        ],
    )
    assert (right.tests, base_only.tests, wrong.tests) == ((True, True), (True, False), (False, False))
    assert (right.passed, base_only.passed, alters.passed) == (True, False, True)
    assert base_only.score == 0.5
    assert found.first_test == "base"


def test_evalplus_oracles(tmp_path: Path, verifier: LocalVerifier) -> None:
    zero = {**PLUS, "task_id": "HumanEval/32", "prompt": "def find_zero(xs):\n", "entry_point": "find_zero", "atol": 1e-4,
            "canonical_solution": "    return -xs[0] / xs[1]\n", "base_input": [[[6.0, 2.0]]], "plus_input": []}  # fmt: skip
    found = load("humaneval_plus", write(tmp_path / "HumanEvalPlus.jsonl", [zero]))
    assert outcomes(judge(verifier, found, ["    return -3.00001\n", "    return 3.0\n"])) == [
        "passed",
        "wrong_answer",
    ]


def test_mbpp_plus_gets_the_types_its_assertions_show(tmp_path: Path, verifier: LocalVerifier) -> None:
    row = {
        "task_id": "Mbpp/2", "prompt": '"""\nShared elements.\n"""\n', "entry_point": "shared", "contract": "", "atol": 0,
        "canonical_solution": "def shared(a, b):\n    assert type(a) is tuple\n    return tuple(set(a) & set(b))\n",
        "base_input": [[[1, 2], [2, 3]]], "plus_input": [[[], [1]]],
        "assertion": "assert set(shared((3, 4), (4, 5))) == {4}",
    }  # fmt: skip
    found = load("mbpp_plus", write(tmp_path / "MbppPlus.jsonl", [row]))
    assert canonical(verifier, found) == ["passed"]
    assert outcomes(judge(verifier, found, ["def shared(a, b):\n    return ()\n"])) == ["wrong_answer"]


@pytest.mark.parametrize(
    ("assertion", "inputs", "retyped"),
    [
        ("assert f((1, 2), [3]) == 1", [[[4, 5, 6], [7]]], [[(4, 5, 6), [7]]]),
        ("assert f([(1, 'a'), (2, 'b')]) == 1", [[[[3, "c"]]]], [[[(3, "c")]]]),
        ("assert f({1, 2}) == 1", [[[3]]], [[{3}]]),
        ("assert f({'a': (1,)}) == 1", [[{"b": [2]}]], [[{"b": (2,)}]]),
        ("assert f(1j) == 1", [["2j"]], [[2j]]),
        ("assert f([{1}, {}]) == 1", [[[[1], []]]], [[[{1}, {}]]]),
        ("assert g(1) == 1", [[[1]]], [[[1]]]),
        ("not python(", [[[1]]], [[[1]]]),
    ],
)
def test_retyping_follows_the_literals(assertion: str, inputs: list[Any], retyped: list[Any]) -> None:
    assert repr(evalplus.retyped(inputs, assertion, "f")) == repr(retyped)


def packed(tests: list[dict[str, str]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


CONTEST = {
    "question_id": "abc_1", "question_title": "Sum", "question_content": "Add the numbers.", "platform": "atcoder",
    "contest_date": "2025-02-01T00:00:00", "starter_code": "", "difficulty": "easy", "metadata": "{}",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": packed([{"input": "2 2\n", "output": "4\n", "testtype": "stdin"}]),
}  # fmt: skip
LEETCODE = {
    **CONTEST, "question_id": "lc_1", "contest_date": "2024-10-01T00:00:00", "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
    "metadata": json.dumps({"func_name": "add"}),
    "public_test_cases": json.dumps([{"input": "1\n[2, 3]", "output": "[1, 2, 3]", "testtype": "functional"}]),
    "private_test_cases": "[]",
}  # fmt: skip


def test_livecodebench(tmp_path: Path, verifier: LocalVerifier) -> None:
    found = load("livecodebench", write(tmp_path / "test6.jsonl", [CONTEST, LEETCODE]))
    assert [task.check.kind for task in found.tasks] == ["stdin", "script"]
    assert found.tasks[0].check.expected == ("3\n", "4\n")
    assert "### Format: Use this starter code" in found.tasks[1].prompt
    reads = judge(
        verifier,
        found,
        [
            "print(sum(map(int, input().split())))\n```\n",
            "print(3)\n```",
            "a, b = map(int, stdin.readline().split())\nprint(a + b)\n",
        ],
    )
    assert outcomes(reads) == ["passed", "wrong_answer", "passed"]
    assert reads[1].tests == (True, False)
    calls = judge(
        verifier,
        found,
        [
            "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        return (a, *b)\n",
            "class Solution:\n    def add(self, a, b):\n        return b\n",
            "class Solution:\n    pass\n",
        ],
        task=1,
    )
    assert outcomes(calls) == ["passed", "wrong_answer", "runtime_error"]


def test_livecodebench_by_date_and_bad_rows(tmp_path: Path) -> None:
    evil = base64.b64encode(zlib.compress(pickle.dumps(print))).decode()
    rows = [CONTEST, LEETCODE, {**CONTEST, "question_id": "evil", "private_test_cases": evil},
            {**CONTEST, "question_id": "junk", "private_test_cases": "junk"},
            {**CONTEST, "question_id": "none", "public_test_cases": "[]", "private_test_cases": "[]"},
            {**LEETCODE, "question_id": "nameless", "contest_date": "2025-03-01", "metadata": "{}"}]  # fmt: skip
    found = load(
        "livecodebench", write(tmp_path / "test.jsonl", rows), first_date="2025-01-01", last_date="2025-12-31"
    )
    assert (found.name, [task.task_id for task in found.tasks]) == (
        "livecodebench_2025-01-01_2025-12-31",
        ["abc_1"],
    )
    reasons = {one.task_id: one.reason for one in found.excluded}
    assert reasons["lc_1"] == "of 2024-10-01, outside the window"
    assert "pickle of something else" in reasons["evil"]
    assert "neither JSON nor packed JSON" in reasons["junk"]
    assert (reasons["none"], reasons["nameless"]) == ("has no tests", "does not name its function")


BIG = {
    "task_id": "BigCodeBench/0", "entry_point": "task_func", "libs": "['json', 'collections']",
    "complete_prompt": "import json\ndef task_func(x):\n    \"\"\"As JSON.\"\"\"\n", "code_prompt": "import json\ndef task_func(x):\n",
    "instruct_prompt": "Write task_func.", "canonical_solution": "    return json.dumps(x)\n",
    "test": "import unittest\nfrom unittest.mock import patch\nclass TestCases(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(task_func([1]), '[1]')\n    def test_patched(self):\n        with patch('json.dumps', return_value='x'):\n            self.assertEqual(task_func([1]), 'x')\n",
}  # fmt: skip


def test_bigcodebench(tmp_path: Path, verifier: LocalVerifier) -> None:
    rows = [
        BIG,
        {**BIG, "task_id": "BigCodeBench/1", "libs": "['no_such_library', 'json']"},
        {**BIG, "task_id": "BigCodeBench/2", "test": "x"},
    ]
    path = write(tmp_path / "BigCodeBench-v0.1.4.jsonl", rows)
    found = load("bigcodebench", path)
    reasons = [one.reason for one in found.excluded]
    assert reasons == ["needs no_such_library, which this Python has not got", "has no unittest class"]
    assert canonical(verifier, found) == ["passed"]
    texts = ["    return '[1]'\n", "    raise SystemExit(0)\n", "    import os; os._exit(0)\n"]
    assert outcomes(judge(verifier, found, texts)) == ["wrong_answer", "wrong_answer", "runtime_error"]
    chat = load("bigcodebench", path, chat=True)
    assert (chat.name, chat.tasks[0].prompt, canonical(verifier, chat)) == (
        "bigcodebench_instruct",
        "Write task_func.",
        ["passed"],
    )


EDIT = {
    "id": 10, "name": "double", "full_name": "10_double", "before": "def f(x):\n    return x\n",
    "after": "def f(x):\n    return 2 * x\n", "tests": "### START TESTS ###\nif True:  # pragma: no cover\n    assert f(2) == 4\n",
    "instruction_descriptive": "Return twice x.", "instruction_lazy": "double it", "taxonomy": {"change_kind": "corrective", "libraries": []},
}  # fmt: skip


def test_canitedit(tmp_path: Path, verifier: LocalVerifier) -> None:
    rows = [EDIT, {**EDIT, "full_name": "11_torchless", "taxonomy": {"libraries": ["no_such_library"]}}]
    path = write(tmp_path / "canitedit.jsonl", rows)
    found = load("canitedit", path)
    assert (
        found.tasks[0].prompt
        == "## Code Before:\ndef f(x):\n    return x\n\n## Instruction:\nReturn twice x.\n## Code After:\n"
    )
    assert [(one.task_id, one.reason) for one in found.excluded] == [
        ("11_torchless", "needs no_such_library, which this Python has not got")
    ]
    assert canonical(verifier, found) == ["passed"]
    assert outcomes(judge(verifier, found, [str(EDIT["before"]), "exit(0)\n"])) == [
        "wrong_answer",
        "runtime_error",
    ]
    assert "## Instruction:" in found.answers.stop(found.tasks[0])
    lazy = load("canitedit", path, variant="lazy", chat=True)
    assert "double it" in lazy.tasks[0].prompt
    assert outcomes(judge(verifier, lazy, ["```py\ndef f(x):\n    return x + x\n```"])) == ["passed"]


def exercise(folder: Path, name: str, *, tests: str = "") -> None:
    home = folder / "exercises" / "practice" / name
    for sub in (".meta", ".docs"):
        (home / sub).mkdir(parents=True)
    files = {"solution": [f"{name}.py"], "test": [f"{name}_test.py"], "example": [".meta/example.py"]}
    (home / ".meta" / "config.json").write_text(json.dumps({"files": files}))
    (home / ".meta" / "example.py").write_text("def double(x):\n    return 2 * x\n")
    (home / ".docs" / "instructions.md").write_text("# Instructions\n\nDouble a number.\n")
    (home / f"{name}.py").write_text("def double(x):\n    pass\n")
    default = f"import unittest\nfrom {name} import double\n\n\nclass DoubleTest(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(double(2), 4)\n"
    (home / f"{name}_test.py").write_text(tests or default)


def test_exercism_as_aider_uses_it(tmp_path: Path, verifier: LocalVerifier) -> None:
    exercise(tmp_path, "double")
    exercise(tmp_path, "empty", tests=" ")
    found = load("exercism", tmp_path)
    assert [task.task_id for task in found.tasks] == ["double"]
    assert [(one.task_id, one.reason) for one in found.excluded] == [("empty", "has no tests")]
    assert "Double a number." in found.tasks[0].prompt
    assert "keep the names" in found.tasks[0].prompt
    assert canonical(verifier, found) == ["passed"]
    texts = ["def double(x):\n    return x\n```\n", "import os\nos._exit(0)\n", "def halve(x): return x\n"]
    assert outcomes(judge(verifier, found, texts)) == ["wrong_answer", "runtime_error", "runtime_error"]


CODEIO = {
    "task_description": "Add and count.", "input_output_spec": "Input: n. Output: a dict.", "difficulty": 6,
    "code_sample": "def main_solution(n):\n    return {'twice': 2 * n, 'parity': n % 2}\n",
    "input_generator": "def generate_inputs(rng):\n    return {'n': rng.randint(1, 9)}\n",
}  # fmt: skip


def test_codeio_questions_are_made_in_the_sandbox(tmp_path: Path, verifier: LocalVerifier) -> None:
    rows = [
        CODEIO, {**CODEIO, "code_sample": "def main_solution(n):\n    raise ValueError(n)"},
        {**CODEIO, "code_sample": "import random, os\ndef main_solution(n):\n    return int.from_bytes(os.urandom(4), 'big')"},
        {**CODEIO, "code_sample": "import os\nos._exit(0)"}, {**CODEIO, "input_generator": "def generate_inputs(rng): return {}"},
    ]  # fmt: skip
    path = write(tmp_path / "codeio.jsonl.gz", rows)
    output = load("codeio", path)
    reasons = [one.reason for one in output.excluded]
    assert "ValueError" in reasons[0]
    assert reasons[1] == "its own code answers differently every time"
    assert "ended early" in reasons[2]
    assert canonical(verifier, output) == ["passed"]
    assert outcomes(judge(verifier, output, ["It is {}.", "no idea"])) == ["wrong_answer", "syntax_error"]
    given = load("codeio", path, variant="input")
    assert canonical(verifier, given) == ["passed"]
    n = json.loads(given.tasks[0].canonical_solution)["n"]
    other = [json.dumps({"n": n + 1}), json.dumps({"m": n}), json.dumps({"n": float(n)})]
    # Any input with the right output is right, and 3.0 is 3 to the function.
    assert outcomes(judge(verifier, given, other)) == ["wrong_answer", "wrong_answer", "passed"]
    assert load("codeio", path).tasks == output.tasks
    assert load("codeio", path, seed=7).tasks != output.tasks


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"reasoning-gym: got not installed.*pip install"):
        package_file()


def test_the_family_and_a_file_of_ones_own(tmp_path: Path) -> None:
    from fewstep.pipelines.tasks.files import write_tasks

    drawn = load_benchmark(BenchmarkChoice(name="family", num_tasks=3))
    assert len(drawn.tasks) == 3
    assert load_benchmark(BenchmarkChoice(name="family", num_tasks=3, seed=1)).digest != drawn.digest
    write_tasks(tmp_path / "mine.jsonl", drawn.tasks)
    own = load("tasks", tmp_path / "mine.jsonl", num_tasks=2)
    assert own.tasks == drawn.tasks[:2]
    with pytest.raises(TaskFileError, match="tasks: path"):
        load_benchmark(BenchmarkChoice(name="tasks"))
