"""kill -9 of the trainer rank and of the driver in the middle of a refinement: it says so, leaves nothing, and the same
command ends with the weights, the data and the record of a run that nothing happened to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.chaos.killed_refine import STEPS, VICTIMS, Kill, Result, drawn, run_refine, tracked

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

HOW_IT_DIED = re.compile(
    r"fewstep: error: trainer rank 0 died: its process \(pid \d+\) was killed or crashed \(.*\); its last phase: \w+; "
    rf"(the same command goes on from step \d of {STEPS}|there is no checkpoint yet: the same command starts over)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of this file, in one store."""
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Result:
    ended = run_refine(folder / "undisturbed")
    assert (ended.code, ended.left) == (0, []), ended.lines
    result = Result.of(folder / "undisturbed")
    assert len(result.order) == STEPS
    assert len({str(step) for step in result.order}) == STEPS
    return result


def test_every_kind_of_victim_is_drawn() -> None:
    for first in range(0, 20, len(VICTIMS)):
        assert {drawn(seed).victim for seed in range(first, first + len(VICTIMS))} == set(VICTIMS)
    kills = [drawn(seed) for seed in range(20)]
    assert {kill.step for kill in kills} == set(range(STEPS))
    assert kills == [drawn(seed) for seed in range(20)]


@pytest.mark.parametrize(("seed", "victim"), [(0, "trainer"), (1, "driver")])
def test_a_killed_refinement_ends_as_an_undisturbed_one(
    folder: Path, undisturbed: Result, seed: int, victim: str
) -> None:
    out = folder / f"{victim}-{seed}"
    kill = replace(drawn(seed), victim=victim)
    _check_death(out, kill)
    resumed = run_refine(out)
    assert (resumed.code, resumed.left) == (0, []), resumed.lines
    assert Result.of(out) == undisturbed
    record = tracked(out)
    assert (record["status"], record["resumed"], record["earlier"]) == ("FINISHED", 1, [])
    assert record["steps"] == list(range(1, STEPS + 1))
    assert list(out.rglob(".*")) == []  # what the dead were writing


def _check_death(out: Path, kill: Kill) -> None:
    ended = run_refine(out, kill)
    assert ended.killed, ended.lines
    assert ended.left == []
    record = tracked(out)
    if kill.victim == "driver":
        assert (ended.code, record["status"]) == (-9, "KILLED")
        return
    assert ended.code == 1
    (error,) = ended.errors
    assert HOW_IT_DIED.fullmatch(error), error
    assert (record["status"], record["failure"].startswith("ActorDied: trainer rank 0 died")) == (
        "FAILED",
        True,
    )
