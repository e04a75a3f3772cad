"""Weights by a gloo broadcast from the sender to all receivers: for many replicas on other nodes.

gloo's broadcast is a binomial tree: whoever has a bucket passes it on, so N receivers take about log2 N bucket times of each
link instead of N of the sender's. Buckets follow each other down the tree, and the sender copies one while it sends the last.

Receivers find the sender's key-value store in the payload, check in, and read there who takes part. The group of one push
serves the next if the same processes take part; else it is built anew. A group loses all its members with one: those that
were broken off say so (`Interrupted`), and `WeightTransport.send` asks them again, without the one that is gone.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fewstep.actors.listening_store import listening_store
from fewstep.actors.weight_sync.base import Interrupted, Payload, WeightTransport
from fewstep.actors.weight_sync.layout import Layout, buckets
from fewstep.platform.ports import address_towards

_logger = logging.getLogger(__name__)

BUCKET_BYTES = 32 * 2**20

_c10d: Any = dist  # it exports its C++ classes without saying so
_POLL_S = 0.001
_ASK_S = 0.1
# Of the time of an attempt: until it goes without those that have not checked in, and until it is given up.
_CHECK_IN_SHARE, _TRANSFER_SHARE = 0.4, 0.9
_SENDER = "sender"
_NOBODY = json.dumps({"generation": 0, "members": []})


@dataclass(frozen=True)
class BroadcastPayload:
    """Where the sender's store is, which push this is, and what comes.

    Attributes:
        sender: names the transport, of which a process may meet several.
        timeout_s: the push is given up after so long.
    """

    sender: str
    host: str
    port: int
    push: int
    timeout_s: float
    layouts: tuple[Layout, ...]

    @contextmanager
    def open(self) -> Iterator[dict[str, torch.Tensor]]:
        member = None
        try:
            member = _idle_member(self)
            received = member.receive(self)
        except RuntimeError as error:  # what torch.distributed raises, its store's errors included
            if member is not None:
                member.close()
            raise Interrupted(f"push {self.push}: {str(error).splitlines()[0]}") from error
        state: dict[str, torch.Tensor] = {}
        for layout, flat in zip(self.layouts, received, strict=True):
            state |= layout.read(flat.numpy())
        try:
            yield state
        finally:
            _give_back(self.sender, member)


class _Group:
    """A process group of one generation, closed with its last reference."""

    def __init__(
        self, generation: int, members: Sequence[str], rank: int, store: Any, address: str, timeout_s: float
    ) -> None:  # fmt: skip
        self.generation, self.members = generation, tuple(members)
        gloo = _c10d.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        # The address on the way to the others: gloo's own choice is whatever the host's name resolves to.
        options._devices = [gloo.create_device(hostname=address)]
        own = _c10d.PrefixStore(f"group/{generation}", store)
        self._gloo: Any = gloo(own, rank, len(members), options)

    def broadcast(self, flat: torch.Tensor, timeout_s: float) -> Any:
        """Send (the first member) or receive uint8 [bytes]; returns what can be waited for."""
        options = _c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=timeout_s)
        return self._gloo.broadcast([flat], options)

    def close(self) -> None:
        """Break off what is under way; the other members' calls fail, too."""
        # On a thread that has the last reference: a group ends only after its last operation, which may wait for its
        # whole time.
        last = [self._gloo]
        self._gloo = None
        threading.Thread(target=_end, args=(last,)).start()


def _end(groups: list[Any]) -> None:
    groups[0].abort()
    groups.clear()


def _wait_for(work: Any, broken: Callable[[], bool]) -> None:
    """Until an operation of gloo's is done, or whatever tells so says that the push is broken.

    It cannot be left to gloo: a send to a process that ended at the wrong moment waits for its whole time.

    Raises:
        RuntimeError: what went wrong.
    """
    asked = time.monotonic()
    while not work.is_completed():
        if time.monotonic() - asked > _ASK_S:
            if broken():
                raise RuntimeError("another receiver is gone")
            asked = time.monotonic()
        time.sleep(_POLL_S)
    work.wait()


class _Member:
    """A receiver's side of one sender: its connection to the store and the group it is in."""

    def __init__(self, payload: BroadcastPayload) -> None:
        self._name = uuid.uuid4().hex
        self._address = address_towards(payload.host, payload.port)
        self._store = _c10d.TCPStore(
            payload.host, payload.port, is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=payload.timeout_s),
        )  # fmt: skip
        self._group: _Group | None = None

    def receive(self, payload: BroadcastPayload) -> list[torch.Tensor]:
        """The buckets, uint8 [bytes] each. Raises RuntimeError."""
        store, key = self._store, f"push/{payload.push}"
        store.set_timeout(timedelta(seconds=payload.timeout_s))
        store.set(f"{key}/{store.add(f'{key}/arrived', 1) - 1}", self._name)
        plan = json.loads(store.get(f"{key}/plan"))
        if self._name not in plan["members"]:
            raise RuntimeError("it began, or ended, without this receiver")
        group = self._group
        if group is None or group.generation != plan["generation"]:
            self.close()
            group = self._group = _Group(
                plan["generation"], plan["members"], plan["members"].index(self._name), store, self._address,
                payload.timeout_s,
            )  # fmt: skip
        received = [torch.empty(layout.num_bytes, dtype=torch.uint8) for layout in payload.layouts]
        for work in [group.broadcast(flat, payload.timeout_s) for flat in received]:
            _wait_for(work, lambda: store.check([f"{key}/broken"]))
        return received

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None


_idle: dict[str, list[_Member]] = {}
_idle_lock = threading.Lock()


def _idle_member(payload: BroadcastPayload) -> _Member:
    """One that served an earlier push of this sender, with its group, or a new one."""
    with _idle_lock:
        for sender in [sender for sender in _idle if sender != payload.sender]:
            for member in _idle.pop(sender):
                member.close()
        if known := _idle.get(payload.sender):
            return known.pop()
    return _Member(payload)


def _give_back(sender: str, member: _Member) -> None:
    with _idle_lock:
        _idle.setdefault(sender, []).append(member)


class BroadcastTransport(WeightTransport):
    """Args:
    host: the address at which receivers reach this process; nothing listens on another.
    """

    name = "broadcast"

    def __init__(self, host: str = "127.0.0.1", bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__()
        self._host, self._bucket_bytes = host, bucket_bytes
        self._id, self._pushes, self._generations = uuid.uuid4().hex, 0, 0
        self._store, self._port = listening_store(host)
        self._group: _Group | None = None
        self._buffers: list[torch.Tensor] = []
        self._planned, self._stop, self._lock = False, threading.Event(), threading.Lock()

    def attempt_s(self, left_s: float, deadline_s: float) -> float:
        """Time for a second attempt is left, should a receiver fall out of the first."""
        return min(left_s, max(left_s / 2, deadline_s / 5))

    @contextmanager
    def publish(
        self, state: Mapping[str, torch.Tensor], num_receivers: int, limit_s: float
    ) -> Iterator[BroadcastPayload]:
        parts = buckets(state, self._bucket_bytes)
        layouts = tuple(Layout.of(bucket) for bucket in parts)
        with self._lock:
            self._pushes, self._planned = self._pushes + 1, False
            self._stop.clear()
        timeout_s = _TRANSFER_SHARE * limit_s
        self._store.set_timeout(timedelta(seconds=timeout_s))
        payload = BroadcastPayload(self._id, self._host, self._port, self._pushes, timeout_s, layouts)
        thread = threading.Thread(
            target=self._serve, args=(payload, parts, num_receivers), name=f"broadcast-{self._pushes}"
        )
        thread.start()
        try:
            yield payload
        finally:
            self._stop.set()
            thread.join()
            for key in ("arrived", "broken"):
                self._store.delete_key(f"push/{payload.push}/{key}")
            # For whoever comes late.
            self._store.set(f"push/{payload.push}/plan", _NOBODY)

    def answered(self, payload: Payload, *, failed: bool) -> None:
        """A failure ends the push it belongs to. Before the plan nobody knows whether who failed had checked in, and a
        group with one that is gone would be waited for: nobody takes part, and all are asked again."""
        assert isinstance(payload, BroadcastPayload)
        if not failed:
            return
        with self._lock:
            if payload.push != self._pushes or self._stop.is_set():
                return
            self._stop.set()
            if self._planned:
                self._store.set(f"push/{payload.push}/broken", "")
            else:
                self._store.set(f"push/{payload.push}/plan", _NOBODY)

    def close(self) -> None:
        self._leave()
        self._buffers = []

    def _serve(
        self, payload: BroadcastPayload, parts: list[dict[str, torch.Tensor]], num_receivers: int
    ) -> None:
        """The sender's side of a push; what goes wrong here, the receivers see as well and answer, without its cause."""
        try:
            members = self._checked_in(payload, num_receivers)
            if len(members) > 1:
                self._send_parts(self._joined(payload, members), payload, parts)
        except RuntimeError as error:
            if not self._stop.is_set():
                _logger.warning("push %d: the sender's side ended: %s", payload.push, error)
            self._leave()
            self._buffers = []  # the group may still be reading them

    def _checked_in(self, payload: BroadcastPayload, num_receivers: int) -> list[str]:
        """The sender and whoever has come by the time that all came who still can."""
        store, key = self._store, f"push/{payload.push}"
        until = time.monotonic() + payload.timeout_s * _CHECK_IN_SHARE / _TRANSFER_SHARE
        while (arrived := store.add(f"{key}/arrived", 0)) < num_receivers or not self._named(key, arrived):
            if time.monotonic() > until or self._stop.wait(_POLL_S):
                break
        # One that ended between its number and its name is not waited for.
        named = [f"{key}/{index}" for index in range(arrived) if store.check([f"{key}/{index}"])]
        names = sorted(store.get(one).decode() for one in named)
        for one in named:
            store.delete_key(one)
        return [_SENDER, *names]

    def _named(self, key: str, arrived: int) -> bool:
        return bool(self._store.check([f"{key}/{index}" for index in range(arrived)]))

    def _joined(self, payload: BroadcastPayload, members: list[str]) -> _Group:
        """The last push's group, or a new one where others take part. Raises RuntimeError if the push is over."""
        group = self._group
        if group is None or group.members != tuple(members):
            self._leave()
            self._generations += 1
        plan = {"generation": self._generations, "members": members}
        with self._lock:
            if self._stop.is_set():
                raise RuntimeError("a receiver is gone")
            self._planned = True
            self._store.set(f"push/{payload.push}/plan", json.dumps(plan))
        if self._group is None:
            self._group = _Group(self._generations, members, 0, self._store, self._host, payload.timeout_s)
        return self._group

    def _send_parts(
        self, group: _Group, payload: BroadcastPayload, parts: list[dict[str, torch.Tensor]]
    ) -> None:
        size = max((layout.num_bytes for layout in payload.layouts), default=0)
        if not self._buffers or len(self._buffers[0]) < size:
            self._buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
        sent: list[Any] = []
        for index, (layout, bucket) in enumerate(zip(payload.layouts, parts, strict=True)):
            if index >= 2:
                _wait_for(sent[index - 2], self._stop.is_set)
            flat = self._buffers[index % 2][: layout.num_bytes]
            layout.write(bucket, flat.numpy())
            sent.append(group.broadcast(flat, payload.timeout_s))
        for work in sent[-2:]:
            _wait_for(work, self._stop.is_set)

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()
