"""The fleet's life cycle, with a clock that the test turns."""

from __future__ import annotations

import pytest

from fewstep.actors.fleet import Fleet, State
from fewstep.platform.records import WeightVersion

V1, V2 = WeightVersion("run", 1, "aa"), WeightVersion("run", 2, "bb")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(clock: Clock) -> Fleet:
    """Two healthy members on V1."""
    fleet = Fleet(["a", "b"], clock, suspect_after_s=10, dead_after_s=30, max_restarts=2)
    fleet.expect(V1)
    for name in ("a", "b"):
        fleet.started(name)
        fleet.admitted(name, V1)
    return fleet


def test_a_started_member_is_stale_until_it_holds_the_expected_weights(clock: Clock) -> None:
    fleet = Fleet(["a"], clock)
    assert fleet.state("a") is State.RESTARTING
    fleet.started("a")
    assert fleet.state("a") is State.STALE
    fleet.expect(V2)
    fleet.admitted("a", V1)
    assert fleet.state("a") is State.STALE
    fleet.admitted("a", V2)
    assert fleet.state("a") is State.HEALTHY


def test_new_weights_make_everyone_stale_who_lacks_them(fleet: Fleet) -> None:
    fleet.expect(V2)
    assert fleet.names(State.STALE) == ["a", "b"]
    fleet.admitted("b", V2)
    fleet.refused("a", "checksum differs")
    assert fleet.names(State.HEALTHY) == ["b"]
    assert fleet.names(State.STALE) == ["a"]
    assert fleet.members["a"].cause == "checksum differs"


def test_expecting_the_same_weights_again_changes_nothing(fleet: Fleet) -> None:
    fleet.expect(V1)
    assert fleet.names(State.HEALTHY) == ["a", "b"]


def test_silence_makes_suspect_then_dead_and_a_sign_of_life_heals(fleet: Fleet, clock: Clock) -> None:
    clock.now = 11
    assert fleet.silence(["a"]) == []
    assert fleet.state("a") is State.SUSPECT
    assert fleet.state("b") is State.HEALTHY  # idle: owes no answer
    fleet.alive("a")
    assert fleet.state("a") is State.HEALTHY
    clock.now = 11 + 31
    assert fleet.silence(["a"]) == ["a"]
    assert fleet.state("a") is State.DEAD
    assert "31 s" in fleet.members["a"].cause


def test_a_restarted_member_is_stale_and_its_old_version_forgotten(fleet: Fleet) -> None:
    fleet.died("a", "killed")
    assert fleet.members["a"].cause == "killed"
    assert fleet.restart("a")
    fleet.started("a")
    assert fleet.state("a") is State.STALE
    assert fleet.members["a"].version is None
    fleet.alive("a")
    assert fleet.state("a") is State.STALE  # being alive is not enough


def test_too_many_deaths_retire(fleet: Fleet) -> None:
    for expected in (True, True, False):
        fleet.died("a", "crash")
        assert fleet.restart("a") is expected
    assert fleet.state("a") is State.RETIRED
    assert fleet.names(State.HEALTHY) == ["b"]


@pytest.mark.parametrize("event", ["started", "restart"])
def test_an_event_out_of_turn_is_a_bug_and_says_so(fleet: Fleet, event: str) -> None:
    with pytest.raises(ValueError, match="a is healthy"):
        getattr(fleet, event)("a")


def test_nobody_dies_twice_or_after_retirement(fleet: Fleet) -> None:
    fleet.died("a", "x")
    fleet.retire("b")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match="already"):
            fleet.died(name, "y")
