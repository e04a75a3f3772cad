"""Entries leave the step's thread, keep their order, and survive a store that fails, refuses or hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fewstep.platform.courier import Courier, Refused, deliver
from fewstep.platform.errors import ResourceError
from fewstep.platform.spool import Entry, Spool


class Store:
    """Takes up to `batch` entries a call; refuses those of kind `bad`; fails its first `failures` calls."""

    def __init__(self, failures: int = 0, batch: int = 3) -> None:
        self.failures, self.batch = failures, batch
        self.taken: list[int] = []
        self.calls: list[int] = []
        self.threads: set[str] = set()

    def apply(self, entries: Sequence[Entry]) -> int:
        self.threads.add(threading.current_thread().name)
        if self.failures:
            self.failures -= 1
            raise ResourceError("store", "database is locked", "a store that answers", "wait")
        if entries[0].kind == "bad":
            raise Refused("not like this")
        good = [entry for entry in entries[: self.batch] if entry.kind != "bad"]
        self.taken += [entry.number for entry in good]
        self.calls.append(len(good))
        return len(good)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "run")
    yield spool
    spool.close()


def fill(spool: Spool, count: int, kind: str = "metrics") -> None:
    for _ in range(count):
        spool.append(kind, {})


def test_entries_are_sent_in_order_and_in_batches_from_another_thread(spool: Spool) -> None:
    store = Store()
    courier = Courier(spool, store, interval_s=0.01)
    fill(spool, 10)
    assert courier.flush(10)
    assert store.taken == list(range(10))
    assert max(store.calls) <= 3
    assert threading.current_thread().name not in store.threads
    assert courier.close(10)


def test_the_end_sends_what_no_round_has_reached(spool: Spool) -> None:
    store = Store()
    courier = Courier(spool, store, interval_s=600)
    fill(spool, 3)
    assert courier.close(10)
    assert store.taken == [0, 1, 2]


def test_a_failing_store_is_tried_again_in_order(spool: Spool) -> None:
    store = Store(failures=2)
    courier = Courier(spool, store, interval_s=0.01, retry_s=0.01)
    fill(spool, 5)
    assert courier.flush(10)
    fill(spool, 5)
    assert courier.close(10)
    assert store.taken == list(range(10))


def test_a_dead_store_is_left_alone_after_a_while_and_keeps_nothing_from_ending(spool: Spool) -> None:
    courier = Courier(spool, Store(failures=10**9), interval_s=0.01, retry_s=0.01)
    fill(spool, 5)
    assert not courier.close(0.3)
    assert spool.num_pending == 5
    assert "database is locked" in str(courier.last_error)


def test_a_store_that_hangs_does_not_keep_the_end_waiting(spool: Spool) -> None:
    release = threading.Event()

    class Hanging(Store):
        def apply(self, entries: Sequence[Entry]) -> int:
            release.wait(60)
            return super().apply(entries)

    courier = Courier(spool, Hanging(), interval_s=0.01)
    fill(spool, 2)
    started = time.monotonic()
    assert not courier.close(0.3)
    assert time.monotonic() - started < 30
    assert spool.num_pending == 2
    release.set()


def test_a_slow_store_has_time_as_long_as_it_takes_something(spool: Spool) -> None:
    class Slow(Store):
        def apply(self, entries: Sequence[Entry]) -> int:
            time.sleep(0.15)
            return super().apply(entries)

    courier = Courier(spool, Slow(batch=1), interval_s=0.01)
    fill(spool, 8)
    assert courier.close(0.6), "1.2 s of work, never 0.6 s without progress"


def test_what_is_refused_steps_aside_for_the_rest(spool: Spool) -> None:
    store = Store()
    fill(spool, 2)
    fill(spool, 1, "bad")
    fill(spool, 2)
    assert deliver(spool, store) == 4
    assert store.taken == [0, 1, 3, 4]
    assert spool.refused() == ["bad: not like this"]
