"""Pushing weights: bytes arrive whole, every echo is checked, no replica can hold up the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.actors.receivers import ReceiverProcess

from fewstep.actors.weight_sync.base import ChecksumMismatch, Echo, Interrupted, Payload, WeightTransport
from fewstep.actors.weight_sync.broadcast import BroadcastTransport
from fewstep.actors.weight_sync.layout import Layout, buckets, packed_bytes
from fewstep.actors.weight_sync.shared_memory import SharedMemoryTransport
from fewstep.kernels.model.checkpoint import state_checksum
from fewstep.platform.records import WeightVersion

MAKERS = {
    "shared_memory": SharedMemoryTransport,
    "broadcast": lambda size: BroadcastTransport(bucket_bytes=size),
}


def some_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(3 + i, 5, generator=draws).to(dtype) for i in range(6)}


def version_of(state: dict[str, torch.Tensor], step: int = 1) -> WeightVersion:
    return WeightVersion("run", step, state_checksum(state))


def read(payload: Payload, version: WeightVersion) -> Echo:
    with payload.open() as state:
        return Echo(version, state_checksum(state))


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture(params=sorted(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def transport(kind: str) -> Iterator[WeightTransport]:
    made = MAKERS[kind](2**20)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 2**20])
def test_every_byte_arrives(
    threads: ThreadPoolExecutor, kind: str, dtype: torch.dtype, bucket_bytes: int
) -> None:
    transport = MAKERS[kind](bucket_bytes)
    for step in range(2):  # what is kept from the first push must not spoil the second
        state = some_state(step, dtype)
        version = version_of(state, step)
        receipt = transport.send(
            state, version, dict.fromkeys("abc", lambda p, v: threads.submit(read, p, v)), deadline_s=60.0
        )
        assert receipt.failures == {}
        assert receipt.echoes == dict.fromkeys("abc", Echo(version, version.checksum))
        assert receipt.num_bytes == packed_bytes(state)
        assert receipt.num_calls == 3  # one a receiver, whatever the number of tensors and buckets
    transport.close()


@given(st.lists(st.integers(1, 400), max_size=12), st.integers(1, 2000))
def test_buckets_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    state = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    groups = buckets(state, limit)
    assert [name for group in groups for name in group] == list(state)
    assert all(len(group) == 1 or Layout.of(group).num_bytes <= limit for group in groups)


def test_another_process_reads_the_bytes(tmp_path: Path) -> None:
    """A real second process: what a replica does, without Ray."""
    import pickle

    state = some_state()
    version = version_of(state)
    script = (
        "import pickle, sys\n"
        "from fewstep.kernels.model.checkpoint import state_checksum\n"
        "payload = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with payload.open() as state: print(state_checksum(state))\n"
    )
    with SharedMemoryTransport().publish(state, 1, 30.0) as payload:
        (tmp_path / "payload").write_bytes(pickle.dumps(payload))
        command = [sys.executable, "-c", script, str(tmp_path / "payload")]
        first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert first.stdout.strip() == version.checksum
    late = subprocess.run(command, capture_output=True, text=True, check=False)
    assert late.returncode != 0
    assert "FileNotFoundError" in late.stderr


def test_a_late_receiver_never_reads_a_reused_descriptor(tmp_path: Path) -> None:
    state = some_state()
    with SharedMemoryTransport().publish(state, 1, 30.0) as payload:
        pass
    other = tmp_path / "other"
    other.write_bytes(b"x" * 10_000)
    number = payload.regions[0].descriptor
    opened = os.open(other, os.O_RDONLY)
    os.dup2(opened, number)
    try:
        with pytest.raises(FileNotFoundError, match="push is over"), payload.open():
            pytest.fail("the block must not run")
    finally:
        os.close(opened)
        if opened != number:
            os.close(number)


def test_a_receiver_cannot_change_the_senders_bytes(threads: ThreadPoolExecutor) -> None:
    state = some_state()
    with SharedMemoryTransport().publish(state, 1, 30.0) as payload:
        with payload.open() as first:
            for tensor in first.values():
                tensor.zero_()
        with payload.open() as second:
            assert state_checksum(second) == state_checksum(state)


def test_no_descriptor_is_left_open(threads: ThreadPoolExecutor) -> None:
    state = some_state()
    before = len(os.listdir("/proc/self/fd"))
    transport = SharedMemoryTransport(64)
    counts = set()
    for _ in range(5):
        transport.send(state, version_of(state), {"a": lambda p, v: threads.submit(read, p, v)})
        counts.add(len(os.listdir("/proc/self/fd")))
    assert len(counts) == 1  # kept for the next push, and no more than that
    transport.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_serves_the_next_push_only_when_nobody_can_still_read_it(threads: ThreadPoolExecutor) -> None:
    """Whoever has not answered keeps a push's bytes or gets an error, never the bytes of a later push."""
    states = [some_state(seed) for seed in range(4)]
    transport, payloads = SharedMemoryTransport(), []

    def keep(payload: Payload, version: WeightVersion) -> Future[Echo]:
        payloads.append(payload)
        return threads.submit(read, payload, version)

    hung: Future[Echo] = Future()
    for index, others in enumerate(({}, {"hung": lambda p, v: hung}, {}, {})):
        receipt = transport.send(
            states[index], version_of(states[index]), {"a": keep, **others}, deadline_s=0.2
        )
        assert list(receipt.echoes) == ["a"]
    inodes = [payload.regions[0].inode for payload in payloads]
    assert inodes[0] == inodes[1]  # the first push was read by all
    assert inodes[1] not in inodes[2:]  # the second was not
    assert inodes[2] == inodes[3]
    with pytest.raises(FileNotFoundError), payloads[1].open():
        pytest.fail("the block must not run")
    other_shapes = {"layer.0": torch.ones(7)}
    assert transport.send(other_shapes, version_of(other_shapes), {"a": keep}).failures == {}
    transport.close()


def test_a_wrong_echo_a_death_and_a_hang_do_not_spoil_the_rest(
    threads: ThreadPoolExecutor, transport: WeightTransport
) -> None:
    state = some_state()
    version = version_of(state)

    def corrupt(payload: Payload, asked: WeightVersion) -> Echo:
        with payload.open() as received:
            next(iter(received.values()))[0, 0] += 1e-3
            return Echo(asked, state_checksum(received))

    def behind(payload: Payload, asked: WeightVersion) -> Echo:
        return replace(read(payload, asked), version=WeightVersion("run", 0, asked.checksum))

    def dead(payload: Payload, asked: WeightVersion) -> Echo:
        raise ConnectionError("gone")

    hung: Future[Echo] = Future()
    receivers = {
        "hung": lambda p, v: hung,
        "dead": lambda p, v: threads.submit(dead, p, v),
        "corrupt": lambda p, v: threads.submit(corrupt, p, v),
        "behind": lambda p, v: threads.submit(behind, p, v),
        "good": lambda p, v: threads.submit(read, p, v),
    }
    started = time.monotonic()
    receipt = transport.send(state, version, receivers, deadline_s=3.0)
    assert time.monotonic() - started < 50
    assert list(receipt.echoes) == ["good"]
    assert {name: type(error) for name, error in receipt.failures.items()} == {
        "hung": TimeoutError,
        "dead": ConnectionError,
        "corrupt": ChecksumMismatch,
        "behind": ChecksumMismatch,
    }


def test_push_ids_differ(transport: WeightTransport) -> None:
    state = some_state()
    ids = {transport.send(state, version_of(state), {}).push_id for _ in range(3)}
    assert len(ids) == 3


def test_a_broadcast_goes_on_without_receivers_that_die_or_hang_and_takes_new_ones_in() -> None:
    """Real processes. Each push takes its time only from the deadline, which is far away."""
    receivers = {
        name: ReceiverProcess(dies_in_push=2 if name == "mortal" else 0) for name in ("mortal", "a", "b")
    }
    transport = BroadcastTransport(bucket_bytes=2**12)
    state = {f"t{index}": torch.full((4096,), float(index)) for index in range(20)}

    def push(step: int, deadline_s: float = 60.0) -> tuple[set[str], dict[str, BaseException], int]:
        receipt = transport.send(state, version_of(state, step), receivers, deadline_s=deadline_s)
        return set(receipt.echoes), dict(receipt.failures), receipt.num_calls

    try:
        assert push(1) == ({"mortal", "a", "b"}, {}, 3)
        started = time.monotonic()
        proved, failures, num_calls = push(2)
        assert time.monotonic() - started < 30  # found out, not waited for
        assert proved == {"a", "b"}
        assert list(failures) == ["mortal"]
        assert num_calls in (4, 5)  # who was broken off is asked again; one may have had all of it
        receivers.pop("mortal").close()
        assert push(3) == ({"a", "b"}, {}, 2)
        receivers["new"] = ReceiverProcess()
        assert push(4) == ({"a", "b", "new"}, {}, 3)
        os.kill(receivers["a"].process.pid or 0, signal.SIGSTOP)
        proved, failures, _ = push(5, deadline_s=10.0)
        assert proved == {"b", "new"}
        assert isinstance(failures["a"], TimeoutError)
    finally:
        transport.close()
        for receiver in receivers.values():
            receiver.close()


def test_who_dies_between_check_in_and_plan_holds_no_broadcast_up() -> None:
    receivers = {
        "mortal": ReceiverProcess(dies_in_push=1, before_plan=True), "a": ReceiverProcess(),
        "late": ReceiverProcess(delay_s=2.0),
    }  # fmt: skip
    transport, state = BroadcastTransport(), some_state()
    try:
        started = time.monotonic()
        receipt = transport.send(state, version_of(state), receivers, deadline_s=120.0)
        assert time.monotonic() - started < 40  # gloo would wait for 54 s to connect to it
        assert set(receipt.echoes) == {"a", "late"}
        assert list(receipt.failures) == ["mortal"]
        assert receipt.num_calls == 5  # the two that live are asked again, once
    finally:
        transport.close()
        for receiver in receivers.values():
            receiver.close()


def test_a_late_failure_in_one_broadcast_is_none_in_the_next() -> None:
    transport, state = BroadcastTransport(), some_state()
    with transport.publish(state, 1, 1.0) as first:
        pass
    with transport.publish(state, 1, 60.0) as second:
        transport.answered(first, failed=True)
        assert read(second, version_of(state)).checksum == state_checksum(state)
    transport.close()


def test_whoever_comes_late_to_a_broadcast_reads_no_other_bytes() -> None:
    transport, state = BroadcastTransport(), some_state()
    with transport.publish(state, 0, 5.0) as payload:
        pass
    with pytest.raises(Interrupted, match="without this receiver"), payload.open():
        pytest.fail("the block must not run")
    transport.close()
