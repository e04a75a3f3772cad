"""Weight sync: one push brings one set of weights to many replicas, and proves that it arrived.

A transport makes the bytes reachable (`publish`); `send` then makes one call per replica, whatever the number
of tensors, waits for the echoes up to a deadline, and reports. It never raises for a replica: one that is dead,
slow or holds other bytes is named in the receipt and the rest goes on.
"""

from __future__ import annotations

import itertools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from fewstep.actors.weight_sync.layout import packed_bytes
from fewstep.platform.records import WeightVersion


@dataclass(frozen=True)
class Echo:
    """What a replica says it holds after a push: the version, and the checksum of its own live tensors."""

    version: WeightVersion
    checksum: str


class Payload(Protocol):
    """A picklable way to the bytes of one push."""

    def open(self) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """The tensors, valid inside the block only.

        Raises:
            OSError: the push is over, or this process cannot reach it.
            Interrupted: another receiver's end broke it off.
        """


Receiver = Callable[[Payload, WeightVersion], "Future[Echo]"]


@dataclass(frozen=True)
class Receipt:
    """One push.

    Attributes:
        push_id: unique in the run.
        num_bytes: weights sent to each replica.
        seconds: from publishing to the last echo or the deadline.
        num_calls: remote calls made.
        echoes: by replica, the proved ones.
        failures: by replica, what went wrong with the others.
    """

    push_id: str
    version: WeightVersion
    transport: str
    num_bytes: int
    seconds: float
    num_calls: int
    echoes: Mapping[str, Echo]
    failures: Mapping[str, BaseException]


class Interrupted(ConnectionError):
    """A push that this receiver would have taken, had another one not fallen out of it; to be asked again."""


class ChecksumMismatch(Exception):
    """A replica holds other bytes than were sent."""


class WeightTransport(ABC):
    """How the bytes travel. Subclasses implement `publish`."""

    name: str

    def __init__(self) -> None:
        self._count = itertools.count()

    @abstractmethod
    def publish(
        self, state: Mapping[str, torch.Tensor], num_receivers: int, limit_s: float
    ) -> AbstractContextManager[Payload]:
        """Make `state` reachable for the length of a block, at most `limit_s`, to so many receivers; a late one gets
        these bytes or an error."""

    def attempt_s(self, left_s: float, deadline_s: float) -> float:
        """How long one publication may wait for echoes, of the time that is left; interrupted receivers get another."""
        return left_s

    def answered(self, payload: Payload, *, failed: bool) -> None:  # noqa: B027
        """Called as a receiver of `payload` answers, from any thread; after `publish`'s block, too."""

    def all_answered(self) -> None:  # noqa: B027 -- most transports keep nothing
        """Called inside `publish`'s block when every receiver has answered."""

    def close(self) -> None:  # noqa: B027
        """Release what is kept between pushes."""

    def send(
        self,
        state: Mapping[str, torch.Tensor],
        version: WeightVersion,
        receivers: Mapping[str, Receiver],
        *,
        deadline_s: float = 30.0,
    ) -> Receipt:
        """Push `state` to every receiver and check each echo against `version`.

        Args:
            version: its checksum is that of `state` (kernels.model.checkpoint.state_checksum).
            receivers: by replica name, a call that starts the load and returns its future.
        """
        started = time.monotonic()
        futures: dict[str, Future[Echo]] = {}
        num_calls, again, left_s = 0, list(receivers), deadline_s
        while left_s > 0 and (again or any(not future.done() for future in futures.values())):
            if again:
                num_calls += len(again)
                limit_s = self.attempt_s(left_s, deadline_s)
                with self.publish(state, len(again), limit_s) as payload:
                    for name in again:
                        futures[name] = receivers[name](payload, version)
                        futures[name].add_done_callback(partial(self._note, payload))
                    wait(futures.values(), timeout=limit_s)
                    # One that failed may still be reading: a caller's error is no proof of the process's end.
                    if all(future.done() and future.exception() is None for future in futures.values()):
                        self.all_answered()
            else:
                wait(
                    [f for f in futures.values() if not f.done()], timeout=left_s, return_when=FIRST_COMPLETED
                )
            again = [name for name, future in futures.items() if _interrupted(future)]
            left_s = deadline_s - (time.monotonic() - started)
        echoes: dict[str, Echo] = {}
        failures: dict[str, BaseException] = {}
        for name, future in futures.items():
            outcome = _outcome(future, version, deadline_s)
            if isinstance(outcome, Echo):
                echoes[name] = outcome
            else:
                failures[name] = outcome
        return Receipt(
            push_id=f"{version.run_id}-{os.getpid()}-{next(self._count)}",
            version=version,
            transport=self.name,
            num_bytes=packed_bytes(state),
            seconds=time.monotonic() - started,
            num_calls=num_calls,
            echoes=echoes,
            failures=failures,
        )

    def _note(self, payload: Payload, future: Future[Echo]) -> None:
        self.answered(payload, failed=future.cancelled() or future.exception() is not None)


def _interrupted(future: Future[Echo]) -> bool:
    return future.done() and isinstance(future.exception(), Interrupted)


def _outcome(future: Future[Echo], version: WeightVersion, deadline_s: float) -> Echo | BaseException:
    if not future.done():
        return TimeoutError(f"no echo within {deadline_s:g} s")
    error = future.exception()
    if error is not None:
        return error
    echo = future.result()
    if echo.version != version or echo.checksum != version.checksum:
        return ChecksumMismatch(f"sent {version}, it holds {echo.version} with checksum {echo.checksum[:12]}")
    return echo
