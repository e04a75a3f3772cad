"""The verifier's own test: a benchmark's solutions through the same path as a model's answers, right and broken.

A right solution that fails is either our defect or the row's, so every one is listed by name. A broken one that passes is
always our defect: each of the breakages below is wrong whatever the task is.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fewstep.actors.verifier import Verifier
from fewstep.pipelines.tasks.benchmark import Benchmark, unrunnable
from fewstep.platform.errors import FewstepError
from fewstep.platform.records import Task

_DETAIL_CHARS = 120
# Calls are counted so that only the outermost result is changed: a recursive function might survive a change inside.
_WRONG_VALUE = """

def _changed(function):
    depth = [0]

    def changed(*arguments, **keywords):
        depth[0] += 1
        try:
            value = function(*arguments, **keywords)
        finally:
            depth[0] -= 1
        return value if depth[0] else other(value)

    def other(value):
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float, complex)):
            return value + 1
        if isinstance(value, str):
            return value + "?"
        if isinstance(value, list):
            return value + [None]
        if isinstance(value, tuple):
            return value + (None,)
        if isinstance(value, dict):
            return {**value, "?": None}
        if isinstance(value, (set, frozenset)):
            return value | {"?"}
        return 0 if value is None else None

    return changed


"""
# Ends the process well before the first test, in languages whose tests are part of the program.
_EXIT = {
    "javascript": "process.exit(0);\n",
    "typescript": "process.exit(0);\n",
    "java": "System.exit(0);\n",
    "cpp": "exit(0);\n",
    "php": "exit(0);\n",
    "ruby": "exit(0)\n",
    "perl": "exit(0);\n",
}
_MUTATED_TASKS = 50
"""Broken solutions a breakage of a language other than Python: each costs a compiler's run and none depends on the task."""


def self_test(benchmark: Benchmark, verifier: Verifier) -> dict[str, Any]:
    """Verdicts over the solutions, and over broken versions of those that pass. Prints a line for each set.

    Returns:
        Plain data: what passed, which rows' own solutions fail, what was left out and why, and the rates.
    """
    excluded = {exclusion.task_id: exclusion.reason for exclusion in unrunnable(benchmark.tasks, verifier)}
    able = [task for task in benchmark.tasks if task.task_id not in excluded]
    solved = [task for task in able if task.canonical_solution or benchmark.infill]
    unsolved = Counter(task.check.language for task in able) - Counter(task.check.language for task in solved)
    print(f"{benchmark.name}: {len(solved)} solutions of {len(benchmark.tasks)} tasks", flush=True)
    report: dict[str, Any] = {
        "name": benchmark.name,
        "source": benchmark.source,
        "digest": benchmark.digest,
        "num_tasks": len(benchmark.tasks),
        "num_excluded_rows": len(benchmark.excluded),
        "tasks_not_run": dict(Counter(excluded.values())),
        "tasks_without_solution": dict(sorted(unsolved.items())),
        "solutions": {},
        "broken": {},
    }
    for language in sorted({task.check.language for task in solved}):
        tasks = [task for task in solved if task.check.language == language]
        answers = [benchmark.answers.read(task, task.canonical_solution) for task in tasks]
        report["solutions"][language] = _judge(
            verifier, f"{language}, as published", tasks, answers, should_pass=True
        )
        unsound = {row["task_id"] for row in report["solutions"][language]["exceptions"]}
        # A change of a wrong answer may be right.
        some = [task for task in tasks if task.task_id not in unsound]
        some = some if language == "python" else some[:_MUTATED_TASKS]
        for name, broken in _breakages(benchmark, language, some).items():
            found = _judge(
                verifier, f"{language}, {name}", some, [broken(task) for task in some], should_pass=False
            )
            report["broken"][f"{language}: {name}"] = found
    return report


def refuse_misjudged(benchmark: Benchmark, report: dict[str, Any]) -> None:
    """Raises FewstepError where a broken solution passed, or a benchmark known to be sound has one that fails."""
    wrong = [
        f"{row['task_id']} passed although broken ({name})"
        for name, found in report["broken"].items()
        for row in found["exceptions"]
    ]
    if benchmark.sound:
        solutions = report["solutions"].values()
        wrong += [f"{row['task_id']} failed" for found in solutions for row in found["exceptions"]]
    if wrong:
        raise FewstepError(f"the verifier misjudged {len(wrong)} programs: {', '.join(wrong[:5])}")


def _breakages(
    benchmark: Benchmark, language: str, tasks: Sequence[Task]
) -> dict[str, Callable[[Task], str]]:
    """Names and makers of answers that are wrong whatever the task is."""

    def solution(task: Task) -> str:
        return benchmark.answers.read(task, task.canonical_solution)

    if language != "python":
        found: dict[str, Callable[[Task], str]] = {"unreadable": lambda task: ")(\n"}
        if language in _EXIT:
            found["leaves early"] = lambda task: "\n" + _EXIT[language] + solution(task)
        return found
    # No string, comment or indentation makes a NUL readable to Python's compiler.
    found = {"unreadable": lambda task: "\0"}
    if not benchmark.infill and all(task.check.kind in ("call", "script") for task in tasks):
        found["wrong value"] = lambda task: (
            f"{solution(task)}{_WRONG_VALUE}{task.check.entry_point} = _changed({task.check.entry_point})\n"
        )
        found["leaves early"] = _leaves_early
    return found


def _leaves_early(task: Task) -> str:
    if task.header is not None:
        return "raise SystemExit(0)\n"
    indents = re.findall(r"^[ \t]+(?=\S)", task.prompt, re.MULTILINE)
    return f"\n{indents[-1] if indents else '    '}raise SystemExit(0)\n"


def _judge(
    verifier: Verifier, name: str, tasks: Sequence[Task], answers: Sequence[str], *, should_pass: bool
) -> dict[str, Any]:
    """Verdicts summed up; `exceptions` are the rows that did not do what they should."""
    start = time.perf_counter()
    verdicts = verifier.verify(list(zip(tasks, answers, strict=True)))
    seconds = time.perf_counter() - start
    passed = sum(verdict.passed for verdict in verdicts)
    print(
        f"  {name:<28} {passed:>5} passed, {len(tasks) - passed:>5} failed  {seconds:7.2f} s  "
        f"{len(tasks) / seconds:7.1f} verdicts/s",
        flush=True,
    )
    return {
        "num": len(tasks),
        "passed": passed,
        "failed": len(tasks) - passed,
        "outcomes": dict(Counter(verdict.outcome for verdict in verdicts).most_common()),
        "isolation": sorted({verdict.isolation for verdict in verdicts}),
        "seconds": seconds,
        "verdicts_per_second": len(tasks) / seconds,
        "exceptions": [
            {"task_id": task.task_id, "outcome": verdict.outcome, "detail": verdict.detail[:_DETAIL_CHARS]}
            for task, verdict in zip(tasks, verdicts, strict=True)
            if verdict.passed != should_pass
        ],
    }
