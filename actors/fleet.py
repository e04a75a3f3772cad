"""Who may serve: the life of each replica as a pure state machine. No Ray, no threads, the clock is given.

    restarting ──started──▶ stale ──admitted──▶ healthy ◀──alive── suspect
                              ▲                    │ expect           ▲ silence
                              └────────────────────┘      healthy ────┘
    any ──died (or long silence)──▶ dead ──restart──▶ restarting, or retired when its restarts are used up

A replica serves only while healthy, and only a completed push of the expected weights makes it so; a restarted
one is stale until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from fewstep.platform.records import WeightVersion


class State(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    RETIRED = "retired"


@dataclass
class Member:
    """One replica as the fleet sees it. `seen` is clock seconds; `cause` is why it last died or fell out."""

    name: str
    state: State
    seen: float
    version: WeightVersion | None = None
    restarts: int = 0
    cause: str = ""


class Fleet:
    """The members and the weights expected of them.

    Args:
        names: members; all begin as `restarting`.
        clock: monotonic seconds.
        suspect_after_s, dead_after_s: silence after which a busy member is suspect, then dead.
        max_restarts: a member that dies more often is retired.
    Raises:
        ValueError: from any event that its member's state does not allow (a bug of the caller).
        KeyError: an unknown name.
    """

    def __init__(
        self,
        names: Iterable[str],
        clock: Callable[[], float],
        *,
        suspect_after_s: float = 10.0,
        dead_after_s: float = 60.0,
        max_restarts: int = 3,
    ) -> None:
        self._clock, self._suspect_after_s, self._dead_after_s = clock, suspect_after_s, dead_after_s
        self._max_restarts = max_restarts
        self.expected: WeightVersion | None = None
        self.members = {name: Member(name, State.RESTARTING, clock()) for name in names}

    def names(self, *states: State) -> list[str]:
        """Members in any of these states, in their fixed order."""
        return [member.name for member in self.members.values() if member.state in states]

    def state(self, name: str) -> State:
        return self.members[name].state

    def quiet_s(self, name: str) -> float:
        """Seconds since its last sign of life."""
        return self._clock() - self.members[name].seen

    def started(self, name: str) -> None:
        """Its process answers; it holds no weights that count yet."""
        member = self._in(name, State.RESTARTING)
        member.state, member.seen, member.version = State.STALE, self._clock(), None

    def expect(self, version: WeightVersion) -> None:
        """From now on only members that hold `version` serve."""
        self.expected = version
        for member in self.members.values():
            if member.state in (State.HEALTHY, State.SUSPECT) and member.version != version:
                member.state = State.STALE

    def admitted(self, name: str, version: WeightVersion) -> None:
        """A push to it completed and was proved; it serves if those are the expected weights."""
        member = self._in(name, State.STALE)
        member.version, member.seen = version, self._clock()
        if version == self.expected:
            member.state, member.cause = State.HEALTHY, ""

    def refused(self, name: str, cause: str) -> None:
        """A push to it failed or could not be proved; it stays stale."""
        self._in(name, State.STALE).cause = cause

    def alive(self, name: str) -> None:
        """A sign of life, or the moment from which one is due; nothing once it is dead or retired."""
        member = self.members[name]
        member.seen = self._clock()
        if member.state is State.SUSPECT:
            member.state = State.HEALTHY

    def silence(self, busy: Iterable[str]) -> list[str]:
        """Judge the silence of members that owe an answer; returns those it just declared dead."""
        died = []
        for member in map(self.members.__getitem__, busy):
            quiet = self.quiet_s(member.name)
            if member.state in (State.HEALTHY, State.SUSPECT, State.STALE) and quiet > self._dead_after_s:
                self.died(member.name, f"no sign of life for {quiet:.0f} s")
                died.append(member.name)
            elif member.state is State.HEALTHY and quiet > self._suspect_after_s:
                member.state = State.SUSPECT
        return died

    def died(self, name: str, cause: str) -> None:
        member = self.members[name]
        if member.state in (State.RETIRED, State.DEAD):
            raise ValueError(f"{name} is {member.state} already")
        member.state, member.cause, member.version = State.DEAD, cause, None

    def restart(self, name: str) -> bool:
        """Begin a restart; False if it has died too often and is retired instead."""
        member = self._in(name, State.DEAD)
        if member.restarts >= self._max_restarts:
            member.state = State.RETIRED
            return False
        member.restarts += 1
        member.state = State.RESTARTING
        return True

    def retire(self, name: str) -> None:
        """Out of service for good."""
        self.members[name].state = State.RETIRED

    def _in(self, name: str, state: State) -> Member:
        member = self.members[name]
        if member.state is not state:
            raise ValueError(f"{name} is {member.state}, this event needs {state}")
        return member
