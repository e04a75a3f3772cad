"""The processes of one sharded model: how they meet, what they exchange, and how a lost one is noticed and named.

Rank 0 leads: it sends orders, the others obey them in the order they come. All ranks compute on CPUs and exchange over gloo.
Nothing is encrypted or authenticated, as in every torch.distributed job: across hosts the ranks belong on a network of their
own, and on one host they meet on the loopback address.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from fewstep.actors.engine.rendezvous import Rendezvous
from fewstep.platform.errors import ActorDied
from fewstep.platform.ports import address_towards

_logger = logging.getLogger(__name__)

# An order comes with its length in one broadcast if it fits here, else in a second one: 4 KiB travel as fast as 8 bytes.
_HEAD_BYTES = 4096
_LENGTH_BYTES = 8
_BEAT_S = 1.0
_POLL_S = 0.02
# A rank starts with an interpreter and torch, on a crowded host perhaps.
_MEETING = timedelta(seconds=180)
# A rank waits for its next order for as long as nobody asks anything of the model.
_NO_DEADLINE = timedelta(days=3650)


class Ranks:
    """One process's end of the group.

    Args:
        rank: 0 leads.
        listener: rank 0's, a descriptor of the socket at the place; the ranks' store answers on it until rank 0 ends.
    Raises:
        ActorDied: not all ranks came within three minutes.
    Attributes:
        address: this host's, as the other ranks see it.
    """

    def __init__(self, place: Rendezvous, rank: int, listener: int | None = None) -> None:
        self.rank, self.num_ranks = rank, place.num_ranks
        self.address = address_towards(place.address, place.port)
        self._deadline = timedelta(seconds=place.deadline_s)
        self._death: ActorDied | None = None
        self._turn = threading.RLock()
        self._ordered = False
        self._closing = threading.Event()
        try:
            leading: dict[str, Any] = (
                {} if listener is None else {"is_master": True, "master_listen_fd": listener}
            )
            self._store: Any = TCPStore(
                place.address, place.port, wait_for_workers=False, timeout=_MEETING, **leading
            )
            self._group = self._gloo()
        except (RuntimeError, ValueError) as error:
            raise ActorDied(
                f"the meeting of {place.num_ranks} ranks at {place.address}:{place.port}", _first_line(error)
            ) from error
        self._beating = threading.Thread(target=self._beat, name="fewstep-rank-beat", daemon=True)
        if rank:
            self._beating.start()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """What one thread of rank 0 orders within is not mixed with another thread's orders.

        An error behind an order leaves the other ranks in the middle of what was ordered, waiting for rank 0: the group is lost
        then, and whoever comes next is told of that error and not, a deadline later, of a silence.

        Raises:
            ActorDied: a rank is lost; at once if that is known from before.
        """
        with self._turn:
            if self._death is not None:
                raise self._death
            around, self._ordered = self._ordered, False
            try:
                yield
            except BaseException as error:
                if self._ordered and self._death is None:
                    self._death = ActorDied(
                        f"rank 0 of {self.num_ranks}", f"{type(error).__name__}: {_first_line(error)}"
                    )
                raise
            finally:
                self._ordered = around or self._ordered

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place; the same bits on every rank, as each part is added up by one of them."""
        options = dist.AllreduceOptions()
        options.timeout = self._deadline
        self._wait(lambda: self._group.allreduce([x], options))
        return x

    def share_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's rows on every rank; the others bring room for them."""
        self._wait(lambda: self._group.broadcast([x], self._broadcast(self._deadline)))
        return x

    def order(self, content: bytes) -> None:
        """Tell the other ranks what to do next."""
        self._ordered = True
        head = torch.zeros(_HEAD_BYTES, dtype=torch.uint8)
        framed = len(content).to_bytes(_LENGTH_BYTES, "little") + content
        inline = framed[:_HEAD_BYTES]
        head[: len(inline)] = torch.frombuffer(bytearray(inline), dtype=torch.uint8)
        self._wait(lambda: self._group.broadcast([head], self._broadcast(self._deadline)))
        if rest := framed[_HEAD_BYTES:]:
            tail = torch.frombuffer(bytearray(rest), dtype=torch.uint8)
            self._wait(lambda: self._group.broadcast([tail], self._broadcast(self._deadline)))

    def obey(self) -> bytes:
        """The next order, however long it takes to come."""
        head = torch.empty(_HEAD_BYTES, dtype=torch.uint8)
        self._wait(lambda: self._group.broadcast([head], self._broadcast(_NO_DEADLINE)))
        framed = head.numpy().tobytes()
        length = int.from_bytes(framed[:_LENGTH_BYTES], "little")
        content = framed[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if missing := length - len(content):
            tail = torch.empty(missing, dtype=torch.uint8)
            self._wait(lambda: self._group.broadcast([tail], self._broadcast(self._deadline)))
            content += tail.numpy().tobytes()
        return content

    def next_number(self) -> int:
        """A number that was not used before, for naming a subject."""
        return int(self._store.add("number", 1))

    def report(self, subject: str, content: dict[str, Any]) -> None:
        """Leave word for rank 0."""
        self._store.set(f"{subject}/{self.rank}", json.dumps(content))

    def reports(self, subject: str) -> list[dict[str, Any]]:
        """What all other ranks have to say, in their order, once they have; ranks that live may take their time.

        Raises:
            ActorDied: one of them is gone.
        """
        keys = [f"{subject}/{rank}" for rank in range(1, self.num_ranks)]
        beats, looked = self._beats(), time.monotonic()
        while not self._store.check(keys):
            time.sleep(_POLL_S)
            if time.monotonic() - looked > self._deadline.total_seconds():
                before, beats, looked = beats, self._beats(), time.monotonic()
                if silent := [rank for rank, beat in beats.items() if beat == before[rank]]:
                    raise self._lost(f"silent for {self._deadline.total_seconds():g} s", silent)
            if self._endings():
                raise self._lost("a rank ended")
        return [json.loads(self._store.get(key)) for key in keys]

    def end(self, cause: str) -> None:
        """Say why this rank gives up; no cause = because a peer is gone."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"end/{self.rank}", cause)

    def close(self) -> None:
        """No more signs of life."""
        self._closing.set()
        if self._beating.is_alive():
            self._beating.join(2 * _BEAT_S)

    def _gloo(self) -> Any:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # Left alone gloo listens on whatever address the host name resolves to, which may be another network's.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.address)]
        options._timeout, options._threads = _MEETING, 2
        return dist.ProcessGroupGloo(PrefixStore("ranks", self._store), self.rank, self.num_ranks, options)

    @staticmethod
    def _broadcast(deadline: timedelta) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, deadline
        return options

    def _wait(self, start: Any) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise self._lost(_first_line(error)) from error

    def _beat(self) -> None:
        while not self._closing.wait(_BEAT_S):
            try:
                self._store.add(f"beat/{self.rank}", 1)
            except RuntimeError:
                return  # rank 0 is gone, and nobody asks any more

    def _beats(self) -> dict[int, int]:
        return {rank: int(self._store.add(f"beat/{rank}", 0)) for rank in range(1, self.num_ranks)}

    def _endings(self) -> dict[int, str]:
        """What ranks that have ended said; empty where they did because of another."""
        ranks = range(1, self.num_ranks)
        return {r: self._store.get(f"end/{r}").decode() for r in ranks if self._store.check([f"end/{r}"])}

    def _lost(self, reason: str, silent: list[int] | None = None) -> ActorDied:
        """Who is gone, and why; on rank 0 that takes a few beats, and later calls fail at once."""
        if self.rank:
            return ActorDied(f"the group of {self.num_ranks} ranks", reason)
        endings: dict[int, str] = {}
        with contextlib.suppress(RuntimeError):
            if silent is None:
                before = self._beats()
                time.sleep(2.5 * _BEAT_S)
                silent = [rank for rank, beat in self._beats().items() if beat == before[rank]]
            endings = self._endings()
        causes = {rank: cause for rank, cause in endings.items() if cause}
        gone = sorted(causes) or [rank for rank in silent or [] if rank not in endings]
        who = " and ".join(f"rank {rank}" for rank in gone) or "a rank"
        cause = "; ".join(causes[rank] for rank in gone if rank in causes) or reason
        self._death = ActorDied(f"{who} of {self.num_ranks}", cause)
        return self._death


def _first_line(error: BaseException) -> str:
    """Without the line of gloo's source that it begins with."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line)
