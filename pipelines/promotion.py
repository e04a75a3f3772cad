"""Which model is served: a candidate becomes champion if it is nowhere worse, or if what it gives up is accepted.

A frontier is a set of points (forwards per answer, pass@1). The candidate's covers a champion's point if one of its own
needs no more forwards and passes no fewer tasks. It dominates if it covers every point of the champion's frontier. A
point that it does not cover is given up in one of two ways, and each has a name:

    quality   no point of the candidate passes as many tasks, at any number of forwards
    speed     one does, but needs more forwards

The comparison is of the measured numbers, without an allowance: a loss of one task in five hundred is noise, and is
said to be, but an allowance would let a hundred promotions lose a hundred times as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.pipelines.frontier import Speedup, reaches
from fewstep.platform.errors import ConfigError
from fewstep.platform.records import FrontierPoint

Trade = Literal["quality", "speed"]
CANDIDATE, CHAMPION = "candidate", "champion"


@dataclass(frozen=True)
class Mark:
    """One point of a frontier."""

    label: str
    pass_at_1: float
    forwards_per_answer: float

    def covers(self, other: Mark) -> bool:
        return self.forwards_per_answer <= other.forwards_per_answer and reaches(
            self.pass_at_1, other.pass_at_1
        )

    def text(self) -> str:
        return f"{self.pass_at_1:.3f} pass@1 at {self.forwards_per_answer:.2f} forwards ({self.label})"


@dataclass(frozen=True)
class Standing:
    """What is known of a registered version.

    Attributes:
        address: `models:/NAME/VERSION`.
        marks: its frontier, dominated points left out.
        data: name and digest of the data set it was measured on.
        num_tasks: how many tasks that has.
        unrefined: frontier of the model it was refined from; empty = not refined.
        bar: pass@1 the unrefined model is held to.
    """

    address: str
    marks: tuple[Mark, ...]
    data: str
    num_tasks: int
    unrefined: tuple[Mark, ...] = ()
    bar: float = 0.0


@dataclass(frozen=True)
class Judgement:
    """What the rule says.

    Attributes:
        gives_up: the trades that must be accepted; empty = the candidate dominates.
        gains: whether it is better anywhere; one that is not is never promoted.
        reasons: a line for each point given up, the worst of each trade first.
    """

    gives_up: tuple[Trade, ...]
    gains: bool
    reasons: tuple[str, ...]


def standing_facts(
    after: Sequence[FrontierPoint], before: Sequence[FrontierPoint], speedup: Speedup, data: str
) -> dict[str, Any]:
    """What a registered model carries with it, so that it can be judged later without its run."""
    return {
        "frontier": [_record(point) for point in after],
        "unrefined": [_record(point) for point in before],
        "bar": speedup.bar,
        "num_tasks": after[0].num_tasks,
        "data": data,
    }


def standing_of(address: str, facts: Mapping[str, Any]) -> Standing:
    """Reads the facts of a version.

    Raises:
        ConfigError: it was registered without a frontier.
    """
    if not facts.get("frontier"):
        raise ConfigError(
            address, "a version without a measured frontier", "a version that `fewstep refine` registered",
            "promote another one",
        )  # fmt: skip
    return Standing(
        address=address,
        marks=undominated([Mark(**mark) for mark in facts["frontier"]]),
        data=str(facts["data"]),
        num_tasks=int(facts["num_tasks"]),
        unrefined=undominated([Mark(**mark) for mark in facts.get("unrefined", [])]),
        bar=float(facts.get("bar", 0.0)),
    )


def judge(candidate: Standing, champion: Standing | None) -> Judgement:
    """The rule. Without a champion the candidate is held to the model it was refined from: the cheapest point at its
    bar must be covered.

    Raises:
        ConfigError: the two were not measured on the same data.
    """
    if champion is None:
        rivals = tuple(mark for mark in candidate.unrefined if reaches(mark.pass_at_1, candidate.bar))
        rivals = (min(rivals, key=lambda mark: mark.forwards_per_answer),) if rivals else ()
        # At the bar, a point counts as equally good (frontier.py: TOLERANCE).
        goals = tuple(Mark(mark.label, candidate.bar, mark.forwards_per_answer) for mark in rivals)
    else:
        if candidate.data != champion.data:
            raise ConfigError(
                "candidate", f"{candidate.address}, measured on {candidate.data}", f"{champion.data}, as {champion.address} was",
                "measure both on the same tasks",
            )  # fmt: skip
        goals = champion.marks
    lost = [goal for goal in goals if not any(mark.covers(goal) for mark in candidate.marks)]
    found = [(_trade(candidate, goal), goal) for goal in lost]
    gives_up = tuple(name for name in ("quality", "speed") if any(trade == name for trade, _ in found))
    gains = champion is None or any(
        not any(rival.covers(mark) for rival in champion.marks) for mark in candidate.marks
    )
    return Judgement(gives_up, gains, tuple(_reasons(candidate, found)))  # type: ignore[arg-type]


def undominated(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The points no other point covers, by rising forwards; of equal ones the first."""
    kept: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.forwards_per_answer, -mark.pass_at_1)):
        if not kept or mark.pass_at_1 > kept[-1].pass_at_1:
            kept.append(mark)
    return tuple(kept)


def _record(point: FrontierPoint) -> dict[str, Any]:
    return {
        "label": point.policy.label(),
        "pass_at_1": point.pass_at_1,
        "forwards_per_answer": point.forwards_per_answer,
    }


def _trade(candidate: Standing, goal: Mark) -> Trade:
    return "speed" if any(reaches(mark.pass_at_1, goal.pass_at_1) for mark in candidate.marks) else "quality"


def _reasons(candidate: Standing, lost: Sequence[tuple[Trade, Mark]]) -> list[str]:
    lines = []
    for trade, goal in lost:
        if trade == "quality":
            best = max(candidate.marks, key=lambda mark: mark.pass_at_1)
            loss = goal.pass_at_1 - best.pass_at_1
            noise = math.sqrt(
                2 * max(goal.pass_at_1 * (1 - goal.pass_at_1), 1 / candidate.num_tasks) / candidate.num_tasks
            )
            note = "within" if loss < 2 * noise else "beyond"
            lines.append(
                f"quality: {goal.text()} becomes at best {best.text()}; {loss:.3f} less, {note} two standard errors"
            )
        else:
            able = [mark for mark in candidate.marks if reaches(mark.pass_at_1, goal.pass_at_1)]
            best = min(able, key=lambda mark: mark.forwards_per_answer)
            lines.append(f"speed: {goal.text()} needs {best.forwards_per_answer:.2f} forwards ({best.label})")
    return sorted(lines)
