"""Answers worth reading: of each outcome class a few, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from fewstep.pipelines.run_record import RunRecord
from fewstep.platform.records import Outcome, Rollout


def outcome_groups(record: RunRecord, examples: int) -> list[dict[str, Any]]:
    """Outcome classes that occur, passed first; each with its counts and examples.

    Args:
        examples: of each class and side at most; the cheapest right answers and the first wrong ones.
    """
    sides = {when: record.answers(when) for when in ("before", "after")}
    sides = {when: found for when, found in sides.items() if found}
    groups = []
    for outcome in get_args(Outcome):
        own = {
            when: [one for one in found if one.verdict.outcome == outcome] for when, found in sides.items()
        }
        if any(own.values()):
            groups.append(
                {
                    "outcome": outcome,
                    "counts": {when: f"{len(found)} of {len(sides[when])}" for when, found in own.items()},
                    "examples": [
                        _example(record, when, one)
                        for when, found in own.items()
                        for one in _chosen(found)[:examples]
                    ],
                }
            )
    return groups


def _chosen(rollouts: Sequence[Rollout]) -> list[Rollout]:
    if rollouts and rollouts[0].verdict.passed:
        return sorted(rollouts, key=lambda one: (one.trajectory.forwards, one.task_id))
    return list(rollouts)


def _example(record: RunRecord, when: str, rollout: Rollout) -> dict[str, Any]:
    trajectory = rollout.trajectory
    return {
        "when": when,
        "task": rollout.task_id,
        "prompt": record.prompts(when).get(rollout.task_id, ""),
        "text": rollout.text,
        "detail": rollout.verdict.detail,
        "tests": f"{sum(rollout.verdict.tests)} of {len(rollout.verdict.tests)} tests passed" if rollout.verdict.tests else "",
        "speed": (
            f"{trajectory.num_tokens} tokens in {trajectory.forwards} forwards "
            f"({trajectory.tokens_per_forward:.2f} TPF), {trajectory.policy.label()}"
        ),
    }  # fmt: skip
