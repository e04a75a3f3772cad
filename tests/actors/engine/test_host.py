"""Many asyncio readers on an engine in another process: order, cancellation, weights, and every way to end."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from functools import partial
from pathlib import Path

import psutil
import pytest
from tests.actors.engine import child_engines
from tests.actors.engine.child_engines import LONG, BrokenEngine, SteppedEngine
from tests.actors.engine.reference.models import VERSION, build_model, engine_of
from tests.actors.engine.reference.requests import draw_request
from tests.waiting import eventually

from fewstep.actors.engine.host import EngineHost, _Reader
from fewstep.actors.engine.request import Request, Update
from fewstep.kernels.model.checkpoint import state_checksum
from fewstep.platform.errors import ActorDied, CheckpointError, FewstepError, RequestError
from fewstep.platform.records import WeightVersion

_OTHER = WeightVersion("test", 1, state_checksum(build_model(seed=1).state_dict()))


@pytest.fixture
def host() -> Iterator[EngineHost]:
    with closing(EngineHost(child_engines.plain)) as host:
        yield host


@dataclasses.dataclass
class Gate:
    """A host whose engine steps as often as it is allowed to."""

    host: EngineHost
    descriptor: int

    def allow(self, steps: int) -> None:
        os.write(self.descriptor, bytes(steps))


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    path = tmp_path / "gate"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)
    with closing(EngineHost(partial(SteppedEngine, path))) as host:
        yield Gate(host, descriptor)
        os.write(descriptor, bytes(1000))
    os.close(descriptor)


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
        assert trajectory.policy == request.policy
        assert "".join(update.text for update in updates) == alone.text_of(expected)
        assert {update.request_id for update in updates} == {request.request_id}
    assert host.stats()["running"] == host.stats()["waiting"] == 0
    assert host.stats()["committed_tokens"] == alone.committed_tokens
    assert host.measures()["slots_free"] == host.num_slots == 3


@pytest.mark.parametrize("way", ["leave the loop", "cancel the task"])
@pytest.mark.parametrize("watch", [False, True])
def test_a_reader_that_goes_away_frees_its_slot_within_one_step(gate: Gate, way: str, watch: bool) -> None:
    host, asked = gate.host, dataclasses.replace(LONG, watch=watch)

    async def leave() -> None:
        async with aclosing(host.submit(asked)) as updates:  # type: ignore[type-var]
            async for _ in updates:
                return

    async def cancel() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in host.submit(asked):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    gate.allow(5)
    asyncio.run(leave() if way == "leave the loop" else cancel())
    # The engine stands before its sixth step; the seventh may begin while the leaving is being read.
    gate.allow(100)
    eventually(lambda: host.stats()["running"] == 0)
    assert int(host.stats()["forwards"]) <= 7
    assert host.measures()["pages_free"] + host.measures()["pages_cached"] == host.measures()["pages_total"]


def test_a_bad_request_is_refused_before_it_starts(host: EngineHost) -> None:
    with pytest.raises(RequestError, match="prompt"):
        host.submit(dataclasses.replace(LONG, prompt_ids=()))


def test_what_the_engine_refuses_is_told_and_the_others_are_unharmed(gate: Gate) -> None:
    async def twice() -> list[Update]:
        owner = asyncio.create_task(collect(gate.host, LONG))
        await asyncio.sleep(0)
        gate.allow(2)  # what a command brings goes out with the step behind it, the first or the second here
        with pytest.raises(RequestError, match="request_id: got long; allowed: an id not in use"):
            await collect(gate.host, LONG)
        gate.allow(100)
        return await owner

    last = asyncio.run(twice())[-1].trajectory
    assert last is not None
    assert last.num_tokens == LONG.max_tokens
    assert gate.host.healthy


def test_weights_change_under_running_requests_and_back(gate: Gate) -> None:
    host = gate.host

    async def across() -> list[Update]:
        updates = []
        gate.allow(5)
        async with aclosing(host.submit(LONG)) as stream:  # type: ignore[type-var]
            updates.append(await anext(stream))
            swap = asyncio.create_task(asyncio.to_thread(host.load_weights, child_engines.other_weights))
            while not swap.done():  # the engine takes them between two steps
                gate.allow(1)
                await asyncio.sleep(0.01)
            await swap
            assert host.stats()["weight_version"] == str(_OTHER)
            gate.allow(LONG.max_tokens)
            updates += [update async for update in stream]
        return updates

    updates = asyncio.run(across())
    trajectory = updates[-1].trajectory
    assert trajectory is not None
    assert (trajectory.weight_version_first, trajectory.weight_version_last) == (str(VERSION), str(_OTHER))
    assert trajectory.num_tokens == sum(update.num_new_tokens for update in updates) == LONG.max_tokens
    host.load_weights(child_engines.first_weights)
    assert (host.stats()["weight_version"], host.weight_swaps) == (str(VERSION), 2)


def test_weights_that_do_not_fit_or_cannot_be_read_leave_the_old_ones(
    host: EngineHost, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match="a different"):
        host.load_weights(child_engines.no_weights)
    with pytest.raises(FewstepError, match="OSError: the disk is gone"):
        host.load_weights(child_engines.unreadable_weights)
    assert (host.stats()["weight_version"], host.weight_swaps) == (str(VERSION), 0)
    assert asyncio.run(collect(host, LONG))[-1].trajectory is not None
    # What the child logs is in this process's log.
    eventually(lambda: "the weights cannot be read" in capfd.readouterr().err)


def test_logits_that_are_no_numbers_fail_the_request_and_not_the_engine(host: EngineHost) -> None:
    host.load_weights(child_engines.no_numbers)
    assert "not finite" in str(asyncio.run(collect(host, LONG))[-1].error)
    host.load_weights(child_engines.first_weights)
    assert asyncio.run(collect(host, LONG))[-1].trajectory is not None


def test_close_ends_open_requests_and_refuses_new_ones(gate: Gate) -> None:
    host = gate.host

    async def close_midway() -> None:
        task = asyncio.create_task(collect(host, LONG))
        await asyncio.sleep(0)
        closing_it = asyncio.create_task(asyncio.to_thread(host.close))
        with pytest.raises(ActorDied, match="closed"):
            await task
        await closing_it

    asyncio.run(close_midway())
    assert not host.healthy
    assert not psutil.pid_exists(host.pid)
    with pytest.raises(ActorDied, match="closed"):
        asyncio.run(collect(host, LONG))
    with pytest.raises(ActorDied, match="closed"):
        host.load_weights(child_engines.first_weights)
    host.close()


@pytest.mark.parametrize(
    ("way", "says"),
    [("raise", "MemoryError: no memory for the second forward"), ("crash", "SIGKILL: the device is lost")],
)
def test_an_engine_that_dies_tells_its_readers_why(way: str, says: str) -> None:
    with closing(EngineHost(partial(BrokenEngine, way))) as host:
        with pytest.raises(ActorDied, match=says):
            asyncio.run(collect(host, LONG))
        assert host.death is not None
        with pytest.raises(ActorDied, match=says):
            host.load_weights(child_engines.first_weights)
        assert not psutil.pid_exists(host.pid)


def test_a_killed_child_ends_open_requests_and_waiting_swaps(gate: Gate) -> None:
    host = gate.host

    async def kill_midway() -> None:
        gate.allow(5)
        async with aclosing(host.submit(LONG)) as updates:  # type: ignore[type-var]
            await anext(updates)
            # The engine stands before its sixth step, so the swap waits.
            swap = asyncio.create_task(asyncio.to_thread(host.load_weights, child_engines.other_weights))
            await asyncio.sleep(0)
            os.kill(host.pid, signal.SIGKILL)
            with pytest.raises(ActorDied, match="SIGKILL"):
                await anext(updates)
            with pytest.raises(ActorDied, match="SIGKILL"):
                await swap

    asyncio.run(kill_midway())


@pytest.mark.parametrize(
    ("opened", "error", "says"),
    [
        (child_engines.missing, CheckpointError, "weights: got nothing"),
        (child_engines.not_opened, ActorDied, "exit code 1.*OSError: no such device"),
    ],
)
def test_an_engine_that_cannot_be_opened_says_why(
    opened: Callable[[], SteppedEngine], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        EngineHost(opened)
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


_PARENT = """
import asyncio, dataclasses, sys
from functools import partial
from pathlib import Path
from tests.actors.engine import child_engines
from fewstep.actors.engine import host as hosts
if sys.argv[1] == "never_opened":
    start = hosts._start
    def noted(inherited):
        process, connection = start(inherited)
        print(process.pid, flush=True)
        return process, connection
    hosts._start = noted
    hosts.EngineHost(child_engines.never_opened)
host = hosts.EngineHost(child_engines.plain)
print(host.pid, flush=True)
async def forever():
    while True:
        async for _ in host.submit(child_engines.LONG):
            pass
asyncio.run(forever())
"""


def has_ended(process: psutil.Process) -> bool:
    """One that waits for init to take it away has."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("state", ["busy", "never_opened"])
def test_a_parent_that_ends_takes_its_child_along(number: signal.Signals, state: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, state], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(number)
    parent.wait(30)
    eventually(lambda: has_ended(child), seconds=5)


def test_a_reader_whose_loop_is_closed_is_dropped(gate: Gate) -> None:
    loop = asyncio.new_event_loop()
    reader = _Reader(LONG.request_id, loop, asyncio.Queue())
    loop.close()
    gate.host._send(("open", gate.host._enter(gate.host._readers, reader), LONG))
    gate.allow(LONG.max_tokens)
    eventually(lambda: int(gate.host.stats()["forwards"]) > 0 and gate.host.stats()["running"] == 0)
    assert int(gate.host.stats()["forwards"]) < LONG.max_tokens


def test_neither_the_host_nor_what_serves_with_it_imports_torch() -> None:
    code = (
        "import sys, fewstep.actors.serving.app, fewstep.actors.serving.loading, "
        "fewstep.actors.serving.alias_follower, fewstep.actors.engine.host; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
