"""An engine in a process of its own, and many asyncio tasks that share it. Knows no torch, no Ray and no HTTP.

The engine's Python and the server's would otherwise take turns on one interpreter lock, whatever cores there are. The
other side of the socket is `child.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, TYPE_CHECKING, Any

from fewstep.actors.engine.request import Request, Update
from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import ActorDied, FewstepError
from fewstep.platform.records import WeightVersion

if TYPE_CHECKING:
    import torch

    from fewstep.actors.engine.engine import Engine

# Makes an engine, in the engine's process; crosses by pickle, so it is a module's function or a dataclass with __call__.
OpenEngine = Callable[[], "Engine"]
# Reads weights for an engine, in its process and beside its steps; crosses as `OpenEngine` does.
ReadWeights = Callable[["Engine"], "tuple[Mapping[str, torch.Tensor], WeightVersion]"]

_CHILD = "fewstep.actors.engine.child"
_LAST_LINES = 5
_STDERR = 2  # the descriptor: Ray sends it to the log of the worker, whatever `sys.stderr` is
# From the end of the socket to the end of the process; the child gives itself half of it.
_EXIT_S = 4.0


@dataclass(frozen=True, eq=False)
class _Reader:
    """Where the updates of one request go: a queue of the event loop that asked for it."""

    request_id: str
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Update | Exception]


_Batches = dict[asyncio.AbstractEventLoop, list[tuple[_Reader, "Update | Exception"]]]


def _deliver(batch: list[tuple[_Reader, Update | Exception]]) -> None:
    for reader, item in batch:
        reader.queue.put_nowait(item)


class EngineHost:
    """Starts an engine in a child process, and owns both. Every method may be called from any thread.

    One message goes out for a command and one comes in for a step of the engine, with all that the step made final.
    What a request has not been read of is bounded by its `max_tokens`; a front that reads nothing fills the socket, and
    then the engine waits. The child ends when this end of the socket does: at `close`, and whichever way this process ends.

    Args:
        open_engine: makes the engine, in the child.
        inherited: descriptors that the child gets under the numbers they have here; they stay the caller's.
    Raises:
        UserError: what `open_engine` raised; ActorDied: the child ended before the engine was there.

    Attributes:
        config: of the engine's model; num_slots: requests it denoises together.
        weight_swaps: times it has taken other weights; pid: the child's.
        death: why no requests are served; None = they are.
    """

    def __init__(self, open_engine: OpenEngine, inherited: Sequence[int] = ()) -> None:
        self._readers: dict[int, _Reader] = {}
        self._calls: dict[int, Future[None]] = {}
        self._numbers = itertools.count()
        self._state, self._sending = threading.Lock(), threading.Lock()
        self._closing = False
        self.death: ActorDied | None = None
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._process, self._connection = _start(inherited)
        self.pid = self._process.pid
        self._log = threading.Thread(target=self._pass_lines_on, name="fewstep-engine-log", daemon=True)
        self._log.start()
        try:
            self._send((open_engine,))
            opened = self._receive()
            if opened is None:
                raise self._why_it_ended("")
            if isinstance(opened, FewstepError):
                raise opened
        except BaseException:
            self._connection.close()
            self._await_exit()
            raise
        self.config: ModelConfig
        self.config, self._names, self.num_slots, self._counts = opened
        self._thread = threading.Thread(target=self._run, name="fewstep-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether requests are being served."""
        return self.death is None

    @property
    def weight_swaps(self) -> int:
        return int(self._counts[1])

    def submit(self, request: Request) -> AsyncIterator[Update]:
        """Updates of one request as they become final; the last one carries its trajectory or its error.

        The request starts with the first `async for` step. Leaving the loop early, `aclose()` or a cancelled
        task aborts it.

        Raises:
            RequestError: at once for a request the model cannot serve; while iterating for an id in use, or one that
                the engine has no memory for.
            ActorDied: while iterating, when the host is closed, its engine has failed or its process has ended.
        """
        request.validate(self.config)
        return self._updates(request)

    async def _updates(self, request: Request) -> AsyncGenerator[Update]:
        reader = _Reader(request.request_id, asyncio.get_running_loop(), asyncio.Queue())
        number = self._enter(self._readers, reader)
        try:
            self._send(("open", number, request))
            while True:
                item = await reader.queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.last:
                    return
        finally:
            if self._readers.pop(number, None) is not None:
                self._send(("leave", number))

    def load_weights(self, read: ReadWeights) -> None:
        """Swap weights between two steps; blocks until done, so call it from a thread of its own in asyncio.

        No tensor crosses: the child reads them, while the engine goes on.

        Raises:
            CheckpointError: as `read` raised it, or the tensors do not fit; the old weights stay.
            FewstepError: `read` failed otherwise; the old weights stay.
            ActorDied: the host is closed, its engine has failed or its process has ended.
        """
        done: Future[None] = Future()
        self._send(("swap", self._enter(self._calls, done), read))
        done.result()

    def stats(self) -> dict[str, int | str]:
        """Counts as of the last message: running, waiting, forwards, rows, committed_tokens, weight_version."""
        version, measures = str(self._counts[0]), self.measures()
        return {
            "running": int(measures["num_running"]),
            "waiting": int(measures["num_waiting"]),
            "forwards": int(measures["forwards"]),
            "rows": int(measures["rows"]),
            "committed_tokens": int(measures["committed_tokens"]),
            "weight_version": version,
        }

    def measures(self) -> dict[str, float]:
        """`Engine.stats` as of the last message, with num_slots and weight_swaps; all of the same step."""
        _, swaps, *values = self._counts
        return {
            **dict(zip(self._names, values, strict=True)), "num_slots": self.num_slots, "weight_swaps": swaps,
        }  # fmt: skip

    def close(self) -> None:
        """End the child after the step under way; open requests end with ActorDied. A second call does nothing."""
        self._closing = True
        # Half of it: what the step under way makes final still comes in, and then the child's end.
        with (
            self._sending,
            suppress(OSError),
            socket.socket(fileno=os.dup(self._connection.fileno())) as ours,
        ):
            ours.shutdown(socket.SHUT_WR)
        self._thread.join()

    def _enter(self, table: dict[int, Any], entry: object) -> int:
        with self._state:
            if self.death is not None:
                raise self.death
            number = next(self._numbers)
            table[number] = entry
        return number

    def _send(self, message: object) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        # An error means that the child has ended, or is about to; `_run` tells everybody.
        with self._sending, suppress(OSError):
            self._connection.send_bytes(data)

    def _receive(self) -> Any:
        """The next message; None once there will be none."""
        try:
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return None

    def _run(self) -> None:
        """Hand out what the child sends, until it has ended."""
        said = ""
        while (message := self._receive()) is not None:
            if isinstance(message, str):
                said = message
            else:
                self._hand_out(*message)
        death = self._why_it_ended(said)
        with self._state:
            self.death = death
        with self._sending:
            self._connection.close()
        for number in list(self._calls):
            self._calls.pop(number).set_exception(death)
        self._wake({}, [(number, death) for number in list(self._readers)])

    def _hand_out(
        self, counts: tuple[Any, ...], updates: list[tuple[Any, ...]], refused: list[Any], calls: list[Any]
    ) -> None:
        """What one step brought, all of a loop's in one call: each call wakes the loop."""
        self._counts = counts
        batches: _Batches = {}
        for number, *fields in updates:
            reader = self._readers.get(number)
            if reader is None:  # it has left
                continue
            update = Update(reader.request_id, *fields)
            if update.last:
                self._readers.pop(number, None)
            batches.setdefault(reader.loop, []).append((reader, update))
        self._wake(batches, refused)
        for number, error in calls:
            done = self._calls.pop(number)
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    def _wake(self, batches: _Batches, errors: list[tuple[int, Exception]]) -> None:
        for number, error in errors:
            reader = self._readers.pop(number, None)
            if reader is not None:
                batches.setdefault(reader.loop, []).append((reader, error))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # the loop is closed, so nobody reads any more
                for number in [
                    number for number, reader in list(self._readers.items()) if reader.loop is loop
                ]:
                    del self._readers[number]
                    self._send(("leave", number))

    def _pass_lines_on(self) -> None:
        """What the child writes goes to this process's log; its last words are kept."""
        output: IO[bytes] | None = self._process.stdout
        assert output is not None
        with output:
            for line in output:
                self._last_lines.append(line.decode(errors="replace").strip())
                os.write(_STDERR, line)

    def _why_it_ended(self, said: str) -> ActorDied:
        code = self._await_exit()
        if self._closing:
            return ActorDied("engine", "closed")
        if said:
            return ActorDied("engine", said)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._log.join(1.0)
        last = " | ".join(line for line in self._last_lines if line)
        return ActorDied(
            "engine", f"its process (pid {self.pid}) was ended {how}" + (f": {last}" if last else "")
        )

    def _await_exit(self) -> int:
        try:
            return self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _start(inherited: Sequence[int]) -> tuple[subprocess.Popen[bytes], Connection]:
    """The child, and this side of its socket. It finds modules where this process does."""
    ours, theirs = socket.socketpair()
    with theirs:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-m", _CHILD, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno(), *inherited],
            env={**os.environ, "PYTHONPATH": path},
        )
    return process, Connection(ours.detach())
