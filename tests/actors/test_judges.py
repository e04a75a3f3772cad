"""Judges: what each takes for right, what it refuses by name, and that none of them can be held or broken by an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewstep.actors.judges import Judge, JudgeChoice
from fewstep.actors.sandbox.sandbox import Sandbox
from fewstep.actors.verifier import LocalVerifier
from fewstep.platform.errors import ConfigError, ResourceError
from fewstep.platform.records import Check, Task, Verdict

REFERENCE = Check("reference", "answer")
DOUBLE = Check("call", "double", inputs=((2,), (3,)), expected=(4, 6))


def task(solution: str = "", check: Check = REFERENCE, prompt: str = "", **tags: str) -> Task:
    return Task("t", prompt, check, canonical_solution=solution, tags=tags)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as box:
        yield box


def passes(sandbox: Sandbox, name: str, own: Task, answer: str, **options: Any) -> bool:
    judge = JudgeChoice(name, options).build()
    assert judge.unfit(own) == ""
    return judge.judge(own, answer, sandbox).passed


def test_exact_match_forgives_what_it_is_told_to(sandbox: Sandbox) -> None:
    assert passes(sandbox, "exact", task("Paris"), " Paris\n")
    assert not passes(sandbox, "exact", task("Paris"), "paris")
    assert passes(sandbox, "exact", task("Paris"), "paris", ignore_case=True)
    assert not passes(sandbox, "exact", task("Paris"), " Paris", strip=False)
    assert "canonical_solution" in JudgeChoice("exact").build().unfit(task())


def test_a_pattern_is_the_options_or_the_tasks_own(sandbox: Sandbox) -> None:
    assert passes(sandbox, "regex", task(), "the answer is 42.", pattern=r"\b42\b")
    assert not passes(sandbox, "regex", task(), "the answer is 42.", pattern="42", whole=True)
    assert passes(sandbox, "regex", task(pattern="^4"), "42", pattern="^5")
    assert "pattern" in JudgeChoice("regex").build().unfit(task())
    assert "its pattern" in JudgeChoice("regex").build().unfit(task(pattern="("))
    with pytest.raises(ConfigError, match=r"verifier_options.pattern"):
        JudgeChoice("regex", {"pattern": "("}).build()


def test_a_pattern_that_backtracks_without_end_is_given_up(sandbox: Sandbox) -> None:
    verdict = (
        JudgeChoice("regex", {"pattern": r"^(\w|\w\w)+$"}).build().judge(task(), "a" * 60 + "!", sandbox)
    )
    assert not verdict.passed
    assert "took longer" in verdict.detail


def test_a_document_must_be_json_and_fit_its_schema(sandbox: Sandbox, tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    own = task(schema=json.dumps(schema))
    assert passes(sandbox, "json_schema", own, '{"name": "x"}')
    for wrong in ('{"name": 1}', "{}", "name", '{"name": "x"} and so on', "[" * 100_000):
        assert not passes(sandbox, "json_schema", own, wrong)
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    assert passes(sandbox, "json_schema", task(), '{"name": "x"}', schema=str(path))
    judge = JudgeChoice("json_schema").build()
    assert "schema" in judge.unfit(task())
    assert "its schema" in judge.unfit(task(schema='{"type": "nothing"}'))
    # A reference to somewhere else is never fetched.
    assert "its schema" in judge.unfit(task(schema='{"$ref": "http://127.0.0.1:9/schema"}'))
    with pytest.raises(ConfigError, match=r"verifier_options.schema"):
        JudgeChoice("json_schema", {"schema": str(tmp_path / "absent.json")}).build()


def test_compiling_runs_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    own = task(check=DOUBLE, prompt="def double(x):\n")
    assert passes(sandbox, "compiles", own, f"    return 0\nopen({str(canary)!r}, 'w')\nwhile True: pass\n")
    assert not canary.exists()
    assert not passes(sandbox, "compiles", own, "return 0\n")
    assert not passes(sandbox, "compiles", own, "    return " + "(" * 100_000)
    assert "ruby" in JudgeChoice("compiles").build().unfit(
        task(check=Check("source", "f", test_code="x", language="ruby"))
    )


def test_tests_need_a_check(sandbox: Sandbox) -> None:
    own = task(check=DOUBLE, prompt="def double(x):\n")
    assert passes(sandbox, "tests", own, "    return 2 * x\n")
    assert not passes(sandbox, "tests", own, "    return x + 2\n")
    assert "no check" in JudgeChoice().build().unfit(task())


def test_a_weighted_sum_is_the_mean_of_its_parts(sandbox: Sandbox) -> None:
    own = task(check=DOUBLE, prompt="def double(x):\n")
    parts = [{"verifier": "tests", "weight": 3}, {"verifier": "regex", "options": {"pattern": "lambda"}}]
    judge = JudgeChoice("weighted", {"parts": parts}).build()
    right = judge.judge(own, "    return 2 * x\n", sandbox)
    assert (right.passed, right.score, right.tests) == (False, 0.75, (True, False))
    half = judge.judge(own, "    return x + 2\n", sandbox)
    assert half.score == pytest.approx(0.75 / 2)
    assert half.outcome == "wrong_answer"
    lenient = JudgeChoice("weighted", {"parts": parts, "pass_score": 0.75}).build()
    assert lenient.judge(own, "    return 2 * x\n", sandbox).passed
    assert "no check" in judge.unfit(task())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("test", {}, "did you mean tests"),
        ("exact", {"stripp": True}, "keyword arguments of ExactMatch"),
        ("weighted", {"parts": [{"verifier": "exact", "wieght": 2}]}, "did you mean weight"),
        ("weighted", {"parts": []}, "at least one part"),
        ("nowhere.at.all:Judge", {}, "importable"),
    ],
)
def test_unknown_names_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        JudgeChoice(name, options).build()


class Odd(Judge):
    """Breaks on one answer."""

    def judge(self, task: Task, answer: str, sandbox: Sandbox) -> Verdict:
        if answer == "odd":
            raise KeyError("no idea")
        return JudgeChoice("exact").build().judge(task, answer, sandbox)


def test_a_judge_that_breaks_is_no_verdict_on_the_answer() -> None:
    with LocalVerifier(judge=JudgeChoice(f"{__name__}:Odd")) as verifier:
        odd, right = verifier.verify([(task("x"), "odd"), (task("x"), "x")])
    assert odd.outcome == "sandbox_error"
    assert "Odd raised KeyError" in odd.detail
    assert "task t" in odd.detail
    assert right.passed


def test_a_host_without_a_required_layer_is_refused() -> None:
    with LocalVerifier(require=["process", "rlimits"]) as verifier:
        assert "process" in verifier.isolation
    with pytest.raises(ResourceError, match="without microvm"):
        LocalVerifier(require=["process", "microvm"])
