"""The desk in front of the engines: who comes in, when, for how long, and what is written down about it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary

from prometheus_client.metrics_core import Metric

from fewstep.actors.engine.host import EngineHost
from fewstep.actors.engine.request import Request, Update
from fewstep.actors.serving.access_log import AccessLog, LogConfig
from fewstep.actors.serving.keys import KeyEntry, KeyRing
from fewstep.actors.serving.limits import Admission, KeyBudgets, LimitsConfig, Place
from fewstep.actors.serving.metrics import ServingMetrics
from fewstep.actors.serving.refusals import DeadlineExceeded, Draining, Refused, WrongKey
from fewstep.actors.serving.tracing import Spans, open_tracer
from fewstep.actors.serving.visit import AnswerRecord, Visit
from fewstep.platform.errors import RequestError

_DRAIN_RETRY_S = 5.0
# Asked by load balancers and browsers that have no key.
_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
_OPEN_FOLDER = "/playground/"

Families = Mapping[str, Sequence[Metric]]


@dataclass(frozen=True)
class DeskOptions:
    """How requests are limited and recorded; crosses the process boundary to a replica."""

    limits: LimitsConfig = field(default_factory=LimitsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    keys: Path | None = None
    trace_endpoint: str = ""


class Desk:
    """Keys, limits, deadlines, metrics, logs and spans of one replica.

    Args:
        engines: the engines by model name; asked each time, so models may come and go.
        replica: this replica's name in metrics.
        gather: the families of all replicas by name; None = this one is alone.
    Raises:
        ConfigError: the file of keys. ResourceError: spans are wanted and cannot be sent.
    """

    def __init__(
        self,
        options: DeskOptions,
        engines: Callable[[], Mapping[str, EngineHost]],
        replica: str = "0",
        gather: Callable[[], Awaitable[Families]] | None = None,
    ) -> None:
        self.limits, self.replica, self._gather = options.limits, replica, gather
        self._engines, self._draining, self.num_open = engines, False, 0
        self._ring = KeyRing(options.keys) if options.keys is not None else None
        self._budgets: dict[str, tuple[KeyEntry | None, KeyBudgets]] = {}
        self._lines: WeakKeyDictionary[EngineHost, Admission] = WeakKeyDictionary()
        self.metrics = ServingMetrics(engines, self.num_waiting)
        self._log = AccessLog(options.log)
        self._spans = Spans(open_tracer(options.trace_endpoint)) if options.trace_endpoint else None

    @property
    def keeps_bodies(self) -> bool:
        """Whether logs may hold what was sent."""
        return self._log.prompts

    def drain(self) -> int:
        """Take nothing new from now on; how many requests are still being answered."""
        self._draining = True
        return self.num_open

    def open(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Visit:
        """A new request. Its deadline is the server's, or a shorter one that it asks for."""
        now = time.monotonic()
        visit = Visit(method, path, now, time.time(), now + self.limits.request_seconds)
        visit.traceparent = headers.get(b"traceparent", b"").decode("latin-1")
        if method == "POST":
            self.num_open += 1
        self.metrics.in_flight.inc()
        return visit

    def check(self, visit: Visit, headers: Mapping[bytes, bytes]) -> None:
        """Let a request in.

        Raises:
            WrongKey, Draining, BudgetSpent: it is refused.
            RequestError: its deadline is no number.
        """
        if self._draining and (visit.method == "POST" or visit.path == "/ready"):
            raise Draining("the server is about to end; ask another one", _DRAIN_RETRY_S)
        if self._ring is not None and not (visit.path in _OPEN_PATHS or visit.path.startswith(_OPEN_FOLDER)):
            visit.key = self._identify(headers.get(b"authorization", b""))
        asked = headers.get(b"x-fewstep-deadline-s")
        if asked is not None:
            visit.deadline = min(visit.deadline, visit.started + _seconds(asked))
        if visit.method == "POST":
            self._budget(visit.key).check()

    def close(self, visit: Visit) -> None:
        """A request is over: count it and write it down."""
        if visit.method == "POST":
            self.num_open -= 1
        self.metrics.in_flight.dec()
        for settle in visit.settle:
            settle()
        ended = time.monotonic()
        self.metrics.note_request(visit, ended - visit.started)
        self._log.request(visit, ended - visit.started)
        if self._spans is not None:
            self._spans.record(visit, ended)

    def admit(
        self, visit: Visit, model: str, host: EngineHost, requests: Sequence[Request], user: str
    ) -> list[AsyncGenerator[Update]]:
        """The updates of each answer, which begin when it has its turn.

        Raises:
            QueueFull: too many wait. RequestError: more tokens than a request may ask for, or one the model cannot serve.
        """
        allowed, asked = self.limits.request_tokens, sum(request.max_tokens for request in requests)
        if allowed is not None and asked > allowed:
            raise RequestError(
                "max_tokens", f"{asked} over {len(requests)} choices", f"at most {allowed} a request",
                "ask for fewer tokens or choices",
            )  # fmt: skip
        updates = [host.submit(request) for request in requests]
        line, pace = self._line(host), _tokens_per_forward(host)
        name, weight = (visit.key.id, visit.key.weight) if visit.key is not None else ("", 1.0)
        places, turns = [], []
        for request in requests:
            turn = asyncio.Event()
            places.append(
                Place(name, weight, max(1.0, request.max_tokens / pace), request.priority, ready=turn.set)
            )
            turns.append(turn)
        visit.user = user
        try:
            line.offer(places)
        except Refused as error:
            visit.refused = error.reason
            raise
        now = time.monotonic()
        records = [AnswerRecord(model, len(request.prompt_ids), now) for request in requests]
        visit.answers += records
        stays = [_Stay(*stay) for stay in zip(places, turns, records, updates, strict=True)]
        visit.settle += [partial(self._settle, visit, host, stay) for stay in stays]
        return [self._answer(visit, host, stay) for stay in stays]

    async def page(self) -> Families:
        """Metrics of all replicas."""
        return {self.replica: self.metrics.families()} if self._gather is None else await self._gather()

    async def _answer(self, visit: Visit, host: EngineHost, stay: _Stay) -> AsyncGenerator[Update]:
        record = stay.record
        try:
            async with _Until(visit.deadline):
                await stay.turn.wait()
            record.started = record.last_block = time.monotonic()
            self.metrics.note_start(record, record.started - record.offered)
            async with aclosing(cast(AsyncGenerator[Update], stay.updates)) as updates:
                while True:
                    async with _Until(visit.deadline):
                        update = await anext(updates)
                    self._note(visit, record, update)
                    yield update
                    if update.last:
                        return
        except Refused as error:
            record.finish, visit.refused = "error", error.reason
            raise
        finally:
            self._settle(visit, host, stay)

    def _note(self, visit: Visit, record: AnswerRecord, update: Update) -> None:
        if update.num_new_tokens:
            now = time.monotonic()
            self.metrics.note_block(record, now - (record.last_block if record.num_blocks else visit.started))
            record.first_block, record.last_block = record.first_block or now, now
            record.num_tokens += update.num_new_tokens
            record.num_blocks += 1
        if update.trajectory is not None:
            record.forwards, record.finish = update.trajectory.forwards, update.trajectory.finish_reason
        elif update.error is not None:
            record.finish = "error"

    def _settle(self, visit: Visit, host: EngineHost, stay: _Stay) -> None:
        """An answer has ended: its slot goes on, what it took is charged. A second call does nothing."""
        record = stay.record
        if record.ended:
            return
        record.ended = time.monotonic()
        held_s = record.ended - record.started if record.started else 0.0
        if not record.forwards and record.num_tokens:
            # An aborted answer has no trajectory; what it took is what such tokens take.
            record.forwards = round(record.num_tokens / _tokens_per_forward(host))
        self._line(host).end(stay.place, max(1, record.forwards))
        self._budget(visit.key).spend(record.num_tokens, held_s)
        self.metrics.note_end(record)

    def _identify(self, header: bytes) -> KeyEntry:
        assert self._ring is not None
        scheme, _, key = header.decode("latin-1").partition(" ")
        entry = self._ring.find(key.strip()) if scheme.lower() == "bearer" else None
        if entry is None:
            raise WrongKey("no API key, or one this server does not know; send `Authorization: Bearer KEY`")
        return entry

    def _budget(self, key: KeyEntry | None) -> KeyBudgets:
        name, limits = key.id if key is not None else "", self.limits
        known = self._budgets.get(name)
        if known is None or known[0] != key:  # a key's own numbers may change while the server runs
            budgets = KeyBudgets(
                (key and key.requests_per_minute) or limits.key_requests_per_minute,
                (key and key.tokens_per_minute) or limits.key_tokens_per_minute,
                (key and key.seconds_per_minute) or limits.key_seconds_per_minute,
                time.monotonic,
            )
            known = self._budgets[name] = (key, budgets)
        return known[1]

    def _line(self, host: EngineHost) -> Admission:
        if host not in self._lines:
            self._lines[host] = Admission(host.num_slots, self.limits.max_waiting, time.monotonic)
        return self._lines[host]

    def num_waiting(self) -> dict[str, int]:
        """Answers that wait in front of each engine, by model."""
        lines = {name: self._lines.get(host) for name, host in self._engines().items()}
        return {name: line.num_waiting if line is not None else 0 for name, line in lines.items()}


@dataclass(frozen=True)
class _Stay:
    place: Place
    turn: asyncio.Event
    record: AnswerRecord
    updates: AsyncIterator[Update]


class _Until:
    """A block that ends with DeadlineExceeded at a moment of the monotonic clock."""

    def __init__(self, deadline: float) -> None:
        self._timeout = asyncio.timeout(max(0.0, deadline - time.monotonic()))

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        try:
            await self._timeout.__aexit__(*error)  # type: ignore[arg-type]
        except TimeoutError:
            raise DeadlineExceeded(
                "the request's deadline passed before it was done; it was dropped"
            ) from None


# The desk that keeps the HTTP request of this task, and the request.
CURRENT: ContextVar[tuple[Desk, Visit]] = ContextVar("fewstep_visit")


def admitted(
    model: str, host: EngineHost, requests: Sequence[Request], user: str
) -> list[AsyncIterator[Update]]:
    """Updates of engine requests, through the desk that is keeping the current HTTP request.

    Raises: as `Desk.admit`; LookupError outside of one.
    """
    desk, visit = CURRENT.get()
    return [*desk.admit(visit, model, host, requests, user)]


def _tokens_per_forward(host: EngineHost) -> float:
    """What the engine has been committing lately."""
    return host.measures()["tokens_per_forward"] or 1.0


def _seconds(header: bytes) -> float:
    try:
        seconds = float(header)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise RequestError(
            "x-fewstep-deadline-s", repr(header.decode("latin-1")[:40]), "seconds above 0", "send a number"
        )
    return seconds
