"""Whether two sets of answers to the same tasks differ by more than the tasks' noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fewstep.pipelines.significance import paired_test, ratio_interval
from fewstep.platform.records import Rollout


def paired_answers(first: Sequence[Rollout], second: Sequence[Rollout], *key: str) -> dict[str, Any] | None:
    """Quality and cost of the second against the first, task by task.

    Args:
        first, second: one answer a task.
        key: of the resampling's random numbers.
    Returns:
        `quality` (paired test of pass@1), `fewer_forwards` (ratio with its interval) and `text`, a line that says so where
        nothing can be claimed; None where the tasks are not the same.
    """
    ours = {rollout.task_id: rollout for rollout in first}
    theirs = {rollout.task_id: rollout for rollout in second}
    if not ours or ours.keys() != theirs.keys():
        return None
    pairs = [(ours[task_id], theirs[task_id]) for task_id in sorted(ours)]
    quality = paired_test(
        [float(one.verdict.passed) for one, _ in pairs], [float(two.verdict.passed) for _, two in pairs], *key
    )
    ratio = ratio_interval(
        [one.trajectory.forwards for one, _ in pairs], [two.trajectory.forwards for _, two in pairs], *key
    )
    cost = f"{ratio.text(2)}x fewer forwards"
    if ratio.low <= 1.0 <= ratio.high:
        cost += ", not significant"
    return {
        "num_tasks": len(pairs),
        "quality": quality.record(),
        "fewer_forwards": asdict(ratio),
        "text": f"pass@1 {quality.verdict()}; {cost}",
    }
