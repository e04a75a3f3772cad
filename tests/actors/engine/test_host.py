"""Many asyncio readers on one engine thread: order, cancellation, weights, and every way to end."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import Iterator
from contextlib import aclosing

import pytest
from tests.actors.engine.reference.models import VERSION, build_model, build_tokenizer, engine_of
from tests.actors.engine.reference.requests import draw_request

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.host import EngineHost, _Reader
from fewstep.actors.engine.request import Request, Update
from fewstep.kernels.model.checkpoint import state_checksum
from fewstep.platform.errors import ActorDied, CheckpointError, RequestError
from fewstep.platform.records import DecodePolicy, WeightVersion

ONE_BY_ONE = DecodePolicy(kind="static", tokens_per_step=1)
# Five forwards fill its first block and so yield an update; sixty bring it to its end.
LONG = Request("long", (4, 5, 6), ONE_BY_ONE, max_tokens=60, ignore_eos=True)


class SteppedEngine(Engine):
    """An engine that takes a step only when the test lets it."""

    def __init__(self) -> None:
        super().__init__(build_model(), build_tokenizer(), max_sequences=4, weight_version=VERSION)
        self.allowed = threading.Semaphore(0)

    def step(self) -> list[Update]:
        if self.has_work:
            self.allowed.acquire()
        return super().step()


class BrokenEngine(Engine):
    """An engine whose second forward dies."""

    def step(self) -> list[Update]:
        if self.forwards:
            raise MemoryError("no memory for the second forward")
        return super().step()


@pytest.fixture
def host() -> Iterator[EngineHost]:
    host = EngineHost(engine_of(max_sequences=3))
    yield host
    host.close()


async def collect(host: EngineHost, request: Request) -> list[Update]:
    return [update async for update in host.submit(request)]


def test_concurrent_readers_get_what_each_would_get_alone(host: EngineHost) -> None:
    rng = random.Random(29)
    requests = [draw_request(rng, str(i)) for i in range(12)]

    async def all_at_once() -> list[list[Update]]:
        return await asyncio.gather(*(collect(host, request) for request in requests))

    alone = engine_of()
    for request, updates in zip(requests, asyncio.run(all_at_once()), strict=True):
        expected = alone.generate([request])[0]
        trajectory = updates[-1].trajectory
        assert trajectory is not None
        assert trajectory.canvas_ids.tolist() == expected.canvas_ids.tolist()
        assert "".join(update.text for update in updates) == alone.text_of(expected)
    assert host.stats()["running"] == host.stats()["waiting"] == 0
    assert host.stats()["committed_tokens"] == alone.committed_tokens


@pytest.mark.parametrize("way", ["leave the loop", "cancel the task"])
def test_a_reader_that_goes_away_aborts_its_request(way: str) -> None:
    engine = SteppedEngine()
    host = EngineHost(engine)

    async def leave() -> None:
        engine.allowed.release(5)
        async with aclosing(host.submit(LONG)) as updates:
            async for _ in updates:
                return

    async def cancel() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in host.submit(LONG):
                started.set()

        task = asyncio.create_task(read())
        engine.allowed.release(5)
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave() if way == "leave the loop" else cancel())
    engine.allowed.release(100)
    # Commands run in order, so once this one has, the abort has too.
    host.load_weights(engine.model.state_dict(), VERSION)
    assert host.stats()["running"] == 0
    assert host.stats()["forwards"] <= 6
    host.close()


def test_a_bad_request_is_refused_before_it_starts(host: EngineHost) -> None:
    with pytest.raises(RequestError, match="prompt"):
        host.submit(dataclasses.replace(LONG, prompt_ids=()))


def test_an_id_in_use_is_refused_and_its_owner_unharmed() -> None:
    engine = SteppedEngine()
    host = EngineHost(engine)

    async def twice() -> list[Update]:
        owner = asyncio.create_task(collect(host, LONG))
        await asyncio.sleep(0)
        engine.allowed.release(1)
        with pytest.raises(RequestError, match="request_id"):
            await collect(host, LONG)
        engine.allowed.release(100)
        return await owner

    last = asyncio.run(twice())[-1].trajectory
    assert last is not None
    assert last.num_tokens == LONG.max_tokens
    host.close()


def test_weights_change_under_running_requests(host: EngineHost) -> None:
    other = build_model(seed=1)
    version = WeightVersion("test", 1, state_checksum(other.state_dict()))
    with pytest.raises(CheckpointError):
        host.load_weights({}, version)
    assert host.stats()["weight_version"] == str(VERSION)
    host.load_weights(other.state_dict(), version)
    trajectory = asyncio.run(collect(host, LONG))[-1].trajectory
    assert trajectory is not None
    assert trajectory.weight_version_first == str(version)


def test_close_ends_open_requests_and_refuses_new_ones() -> None:
    engine = SteppedEngine()
    host = EngineHost(engine)

    async def close_midway() -> None:
        task = asyncio.create_task(collect(host, LONG))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(host.close))
        while not host._closing:
            await asyncio.sleep(0)
        engine.allowed.release(LONG.max_tokens)
        with pytest.raises(ActorDied, match="closed"):
            await task
        await closing

    asyncio.run(close_midway())
    assert not host.healthy
    with pytest.raises(ActorDied, match="closed"):
        asyncio.run(collect(host, LONG))
    with pytest.raises(ActorDied, match="closed"):
        host.load_weights({}, VERSION)
    host.close()


def test_an_engine_that_dies_tells_its_readers_why(caplog: pytest.LogCaptureFixture) -> None:
    engine = BrokenEngine(build_model(), build_tokenizer(), max_sequences=2, weight_version=VERSION)
    host = EngineHost(engine)
    with pytest.raises(ActorDied, match="no memory for the second forward"):
        asyncio.run(collect(host, LONG))
    assert not host.healthy
    assert "the engine failed" in caplog.text
    host.close()


def test_a_reader_whose_loop_is_closed_is_dropped() -> None:
    engine = SteppedEngine()
    host = EngineHost(engine)
    loop = asyncio.new_event_loop()
    reader = _Reader(loop, asyncio.Queue())
    loop.close()
    host._post(lambda: host._open(LONG, reader))
    engine.allowed.release(LONG.max_tokens)
    for _ in range(LONG.max_tokens):
        # Each returns after at least one more step, while there is work.
        host.load_weights(engine.model.state_dict(), VERSION)
    assert host.stats()["running"] == 0
    assert 0 < host.stats()["forwards"] <= 5
    host.close()
