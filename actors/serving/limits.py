"""Who may start when: a bounded queue that is fair between keys, and budgets a minute. Pure logic; the clock is passed in."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydantic import Field

from fewstep.actors.serving.refusals import BudgetSpent, QueueFull
from fewstep.platform.config import Config

Clock = Callable[[], float]

_MINUTE_S = 60.0
_MAX_RETRY_S = 60.0
# Ends of answers that the rate is observed over, and the time before the first of them.
_RATE_WINDOW = 64
_UNKNOWN_RETRY_S = 5.0


class LimitsConfig(Config):
    """What one replica takes on. Counts and rates are per replica: two replicas take twice as much."""

    max_waiting: int = Field(default=256, ge=0)
    """Answers that may wait for a slot; beyond them requests get 429 with Retry-After."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1, le=4 * 2**20)
    """Bytes of a request's body."""
    request_tokens: int | None = Field(default=None, ge=1)
    """Tokens that one request may ask for, all its choices together; null = what the context allows each."""
    request_seconds: float = Field(default=600.0, gt=0.0)
    """Deadline of a request, waiting included; a client asks for a shorter one with the header x-fewstep-deadline-s."""
    key_requests_per_minute: float | None = Field(default=None, gt=0.0)
    """Requests of one key; null = no limit. The file of keys can say otherwise for a key."""
    key_tokens_per_minute: float | None = Field(default=None, gt=0.0)
    """Committed tokens of one key; null = no limit."""
    key_seconds_per_minute: float | None = Field(default=None, gt=0.0)
    """Seconds of engine slots of one key (two answers at once use two a second); null = no limit."""


@dataclass
class Budget:
    """An amount a minute with one minute of burst. What is spent is known afterwards, so it may go into debt.

    Attributes:
        per_minute: refilled evenly; None = unlimited.
        least: what must be left for another request; more than zero, or rounding would leave a debt that was paid.
    """

    per_minute: float | None
    clock: Clock
    least: float = 1e-3
    level: float = field(init=False)
    _updated: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self._updated = max(self.least, self.per_minute or 0.0), self.clock()

    def spend(self, amount: float) -> None:
        """Take `amount`, which has been used already."""
        if self.per_minute is not None:
            self._refill(self.per_minute)
            self.level -= amount

    def wait_s(self) -> float:
        """Seconds until enough is left; 0 = now."""
        if self.per_minute is None:
            return 0.0
        self._refill(self.per_minute)
        return max(0.0, (self.least - self.level) * _MINUTE_S / self.per_minute)

    def _refill(self, per_minute: float) -> None:
        now = self.clock()
        self.level = min(
            max(self.least, per_minute), self.level + (now - self._updated) * per_minute / _MINUTE_S
        )
        self._updated = now


class KeyBudgets:
    """The three budgets of one key."""

    def __init__(
        self, requests: float | None, tokens: float | None, seconds: float | None, clock: Clock
    ) -> None:
        self._budgets = {
            "requests": Budget(requests, clock, least=1.0 - 1e-6),
            "tokens": Budget(tokens, clock),
            "engine seconds": Budget(seconds, clock),
        }

    def check(self) -> None:
        """Count one request.

        Raises:
            BudgetSpent: with the time until the emptiest budget is positive again; nothing was counted.
        """
        name = max(self._budgets, key=lambda name: self._budgets[name].wait_s())
        wait_s = self._budgets[name].wait_s()
        if wait_s > 0:
            allowed = self._budgets[name].per_minute
            raise BudgetSpent(
                f"this key's {allowed:g} {name} a minute are used; try again in {wait_s:.1f} s", wait_s
            )
        self._budgets["requests"].spend(1)

    def spend(self, num_tokens: int, seconds: float) -> None:
        """What an answer used in the end."""
        self._budgets["tokens"].spend(num_tokens)
        self._budgets["engine seconds"].spend(seconds)


@dataclass(eq=False)
class Place:
    """One answer's place: in the queue, then in a slot, then gone.

    Attributes:
        key: who pays; weight: its share relative to others.
        cost: forwards expected, until the end says how many there were.
        ready: called once when it has its slot.
    """

    key: str
    weight: float
    cost: float
    priority: int = 0
    state: str = "waiting"
    ready: Callable[[], None] = lambda: None


class FairQueue:
    """Waiting places, served by fair share between keys.

    Each key has a counter of the work it has been given, divided by its weight; the key with the smallest counter is
    next. A key that comes back from idling is lifted to the smallest counter among the busy ones, so that time it did
    not use is no credit (virtual token counter: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
    algorithm 2; here the unit is a forward of one block, which is what a diffusion model spends).
    Within a key higher priority goes first, then who came first.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[int, int, Place]]] = {}
        self._running: dict[str, int] = {}
        self._counters: dict[str, float] = {}
        self._order = itertools.count()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, place: Place) -> None:
        if not self._busy(place.key):
            self._lift(place.key)
        heapq.heappush(self._waiting.setdefault(place.key, []), (-place.priority, next(self._order), place))
        self._num_waiting += 1

    def pop(self) -> Place | None:
        """The next place, its expected cost charged; None if nobody waits."""
        keys = [key for key, heap in self._waiting.items() if heap]
        if not keys:
            return None
        key = min(keys, key=self._counters.__getitem__)
        place = heapq.heappop(self._waiting[key])[2]
        self._num_waiting -= 1
        self._running[key] = self._running.get(key, 0) + 1
        self._counters[key] += place.cost / place.weight
        return place

    def remove(self, place: Place) -> None:
        """Take out one that waits and will not be served."""
        heap = self._waiting[place.key]
        heap[:] = [entry for entry in heap if entry[2] is not place]
        heapq.heapify(heap)
        self._num_waiting -= 1
        self._forget(place.key)

    def end(self, place: Place, cost: float) -> None:
        """A place that was popped is done; `cost` is what it took instead of what was expected."""
        self._counters[place.key] += (cost - place.cost) / place.weight
        self._running[place.key] -= 1
        self._forget(place.key)

    def _busy(self, key: str) -> bool:
        return bool(self._waiting.get(key)) or self._running.get(key, 0) > 0

    def _lift(self, key: str) -> None:
        busy = [counter for other, counter in self._counters.items() if self._busy(other)]
        self._counters[key] = max(self._counters.get(key, 0.0), min(busy, default=0.0))

    def _forget(self, key: str) -> None:
        """Drop what no longer matters: an idle key at or below every busy one would be lifted anyway."""
        if self._busy(key):
            return
        self._waiting.pop(key, None)
        self._running.pop(key, None)
        floor = min((counter for other, counter in self._counters.items() if self._busy(other)), default=None)
        for other in [other for other in self._counters if not self._busy(other)]:
            if floor is None or self._counters[other] <= floor:
                del self._counters[other]


class Admission:
    """The slots of one engine and the queue before them.

    The engine's own queue is first come, first served, so no more are let in than it can take up at once; an eighth
    more than it has slots, because a slot that waits for the event loop to hear of its freedom idles for a step.

    Args:
        num_slots: requests the engine denoises together.
        max_waiting: places that may wait.
    """

    def __init__(self, num_slots: int, max_waiting: int, clock: Clock) -> None:
        self.num_slots, self.max_waiting = num_slots + -(-num_slots // 8), max_waiting
        self.num_running = 0
        self._queue, self._clock = FairQueue(), clock
        self._ends: deque[float] = deque(maxlen=_RATE_WINDOW)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def offer(self, places: Sequence[Place]) -> None:
        """Let the answers of one request in, all or none; those with a free slot are `running` afterwards.

        Raises:
            QueueFull: too many would wait.
        """
        free = max(0, self.num_slots - self.num_running - self.num_waiting)
        # A request whose own choices are more than the queue holds would be refused for ever: it may wait alone.
        alone = self.num_waiting == 0 and self.num_running == 0
        if self.num_waiting + len(places) - free > self.max_waiting and not alone:
            wait_s = self.retry_after_s(len(places))
            raise QueueFull(
                f"{self.num_waiting} answers wait for {self.num_slots} slots; try again in {wait_s:.0f} s",
                wait_s,
            )
        for place in places:
            self._queue.push(place)
        self._fill()

    def end(self, place: Place, cost: float) -> None:
        """The answer is complete, failed, or nobody wants it any more; a second call does nothing.

        Args:
            cost: forwards it took.
        """
        if place.state == "waiting":
            self._queue.remove(place)
        elif place.state == "running":
            self._queue.end(place, cost)
            self.num_running -= 1
            self._ends.append(self._clock())
        place.state = "ended"
        self._fill()

    def retry_after_s(self, num_places: int = 1) -> float:
        """When `num_places` more would find room, at the rate at which answers have been ending lately."""
        if len(self._ends) < 2 or self._clock() <= self._ends[0]:
            return _UNKNOWN_RETRY_S
        rate = len(self._ends) / (self._clock() - self._ends[0])
        excess = self.num_waiting + num_places - self.max_waiting
        return min(_MAX_RETRY_S, max(1.0, excess / rate))

    def _fill(self) -> None:
        while self.num_running < self.num_slots and (place := self._queue.pop()) is not None:
            place.state = "running"
            self.num_running += 1
            place.ready()
