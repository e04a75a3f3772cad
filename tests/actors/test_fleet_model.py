"""The fleet against everything that can happen to it, in any order: a model-based test, without Ray and with a clock that
the machine turns."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from fewstep.actors.fleet import Fleet, State
from fewstep.platform.records import WeightVersion

SUSPECT_AFTER_S, DEAD_AFTER_S, MAX_RESTARTS = 10.0, 30.0, 2
NAMES = ("a", "b", "c")
names = st.sampled_from(NAMES)


class FleetMachine(RuleBasedStateMachine):
    """Keeps of every member what an outside observer knows: which weights were proved to its current process, how often it
    died, when it last gave a sign of life."""

    versions = Bundle("versions")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.fleet = Fleet(
            NAMES, lambda: self.now, suspect_after_s=SUSPECT_AFTER_S, dead_after_s=DEAD_AFTER_S, max_restarts=MAX_RESTARTS
        )  # fmt: skip
        self.proved: dict[str, WeightVersion | None] = dict.fromkeys(NAMES)
        self.deaths = dict.fromkeys(NAMES, 0)
        self.retired: set[str] = set()
        self.number = 0

    def refused(self, name: str, event: str, *arguments: object) -> bool:
        """Whether the fleet calls an event out of turn, in which case nothing has changed."""
        before, said = repr(self.fleet.members[name]), ""
        try:
            getattr(self.fleet, event)(name, *arguments)
        except ValueError as error:
            said = str(error)
        assert not said or (name in said and repr(self.fleet.members[name]) == before)
        return bool(said)

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=versions)
    def weights_are_made(self) -> WeightVersion:
        self.number += 1
        return WeightVersion("run", self.number, f"{self.number:04x}")

    @rule(version=versions)
    def weights_are_expected(self, version: WeightVersion) -> None:
        self.fleet.expect(version)

    @rule(name=names)
    def a_process_answers(self, name: str) -> None:
        was = self.fleet.state(name)
        assert self.refused(name, "started") == (was is not State.RESTARTING)
        if was is State.RESTARTING:
            self.proved[name] = None

    @rule(name=names, version=versions)
    def a_push_is_proved(self, name: str, version: WeightVersion) -> None:
        was = self.fleet.state(name)
        assert self.refused(name, "admitted", version) == (was is not State.STALE)
        if was is State.STALE:
            self.proved[name] = version

    @rule(name=names)
    def a_push_fails(self, name: str) -> None:
        was = self.fleet.state(name)
        assert self.refused(name, "refused", "checksum differs") == (was is not State.STALE)
        if was is State.STALE:
            assert self.fleet.members[name].cause == "checksum differs"

    @rule(name=names)
    def a_sign_of_life(self, name: str) -> None:
        self.fleet.alive(name)
        assert self.fleet.state(name) is not State.SUSPECT

    @rule(busy=st.sets(names))
    def silence_is_judged(self, busy: set[str]) -> None:
        quiet = {name: self.fleet.quiet_s(name) for name in NAMES}
        before = {name: self.fleet.state(name) for name in NAMES}
        died = self.fleet.silence(busy)
        for name in NAMES:
            running = before[name] in (State.HEALTHY, State.SUSPECT, State.STALE)
            assert (name in died) == (name in busy and running and quiet[name] > DEAD_AFTER_S)
            if name in died:
                self._dies(name)
                assert "no sign of life" in self.fleet.members[name].cause
            elif name in busy and before[name] is State.HEALTHY and quiet[name] > SUSPECT_AFTER_S:
                assert self.fleet.state(name) is State.SUSPECT
            else:
                assert self.fleet.state(name) is before[name]

    @rule(name=names)
    def a_process_dies(self, name: str) -> None:
        was = self.fleet.state(name)
        assert self.refused(name, "died", "killed by signal 9") == (was in (State.DEAD, State.RETIRED))
        if was not in (State.DEAD, State.RETIRED):
            self._dies(name)
            assert self.fleet.members[name].cause == "killed by signal 9"

    def _dies(self, name: str) -> None:
        self.proved[name] = None
        self.deaths[name] += 1

    @rule(name=names)
    def a_restart_is_tried(self, name: str) -> None:
        if self.fleet.state(name) is not State.DEAD:
            assert self.refused(name, "restart")
            return
        begun = self.fleet.restart(name)
        assert begun == (self.deaths[name] <= MAX_RESTARTS)
        if not begun:
            self.retired.add(name)

    @precondition(lambda self: len(self.retired) < len(NAMES) - 1)
    @rule(name=names)
    def a_member_is_retired(self, name: str) -> None:
        self.fleet.retire(name)
        self.retired.add(name)

    @invariant()
    def only_proved_weights_that_are_expected_serve(self) -> None:
        for name in self.fleet.names(State.HEALTHY, State.SUSPECT):
            assert self.proved[name] is not None
            assert self.proved[name] == self.fleet.expected == self.fleet.members[name].version

    @invariant()
    def the_dead_hold_nothing_and_the_retired_stay(self) -> None:
        for name in self.fleet.names(State.DEAD, State.RESTARTING):
            assert self.fleet.members[name].version is None or self.fleet.state(name) is State.RESTARTING
        assert set(self.fleet.names(State.RETIRED)) == self.retired

    @invariant()
    def everyone_is_in_one_state(self) -> None:
        assert sorted(self.fleet.names(*State)) == sorted(NAMES)
        assert all(self.fleet.members[name].restarts <= MAX_RESTARTS for name in NAMES)


FleetMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFleet = FleetMachine.TestCase
