"""Metrics leave the step's thread, keep their order, and survive a store that fails for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from fewstep.platform.errors import ResourceError
from fewstep.platform.metric_writer import MetricPoint, MetricWriter


def points(first: int, count: int) -> list[MetricPoint]:
    return [MetricPoint("train/loss", float(step), step, 1000 + step) for step in range(first, first + count)]


class Store:
    """Collects batches; refuses the first `failures` of them."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.batches: list[list[MetricPoint]] = []
        self.threads: set[str] = set()

    def send(self, batch: Sequence[MetricPoint]) -> None:
        self.threads.add(threading.current_thread().name)
        if self.failures:
            self.failures -= 1
            raise ResourceError("store", "database is locked", "a store that answers", "wait")
        self.batches.append(list(batch))

    @property
    def written(self) -> list[MetricPoint]:
        return [point for batch in self.batches for point in batch]


def wait_for(store: Store, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(store.written) < count:
        assert time.monotonic() < deadline, f"{len(store.written)} of {count} points after 10 s"
        time.sleep(0.005)


def test_points_are_written_in_batches_from_another_thread() -> None:
    store = Store()
    writer = MetricWriter(store.send, batch_size=4, interval_s=0.01)
    writer.add(points(0, 10))
    wait_for(store, 10)
    assert store.written == points(0, 10)
    assert max(map(len, store.batches)) <= 4
    assert threading.current_thread().name not in store.threads
    assert writer.close() == (0, None)


def test_close_writes_what_no_round_has_reached() -> None:
    store = Store()
    writer = MetricWriter(store.send, interval_s=60)
    writer.add(points(0, 3))
    assert writer.close() == (0, None)
    assert store.written == points(0, 3)


def test_a_failing_store_is_tried_again_in_order() -> None:
    store = Store(failures=3)
    writer = MetricWriter(store.send, interval_s=0.01)
    writer.add(points(0, 5))
    deadline = time.monotonic() + 10
    while store.failures:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    writer.add(points(5, 5))
    assert writer.close() == (0, None)
    assert store.written == points(0, 10)


def test_what_a_dead_store_never_took_is_counted_with_its_cause() -> None:
    writer = MetricWriter(Store(failures=10**9).send, interval_s=0.01, attempts=2)
    writer.add(points(0, 5))
    unwritten, cause = writer.close()
    assert unwritten == 5
    assert cause is not None
    assert "database is locked" in str(cause)


def test_a_finished_run_takes_no_more_metrics() -> None:
    writer = MetricWriter(Store().send, interval_s=0.01)
    writer.close()
    with pytest.raises(RuntimeError, match="finished"):
        writer.add(points(0, 1))
