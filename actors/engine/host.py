"""A thread that drives one engine, so that many asyncio tasks can share it. Knows no Ray and no HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request, Update
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import ActorDied, CheckpointError, RequestError
from fewstep.platform.records import WeightVersion

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Reader:
    """Where the updates of one request go: a queue of the event loop that asked for it."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Update | Exception]

    def put(self, item: Update | Exception) -> bool:
        """Hand over from the engine's thread; False when the loop is closed, so nobody reads any more."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            return False
        return True


def _deliver(batch: list[tuple[_Reader, Update]]) -> None:
    for reader, update in batch:
        reader.queue.put_nowait(update)


class EngineHost:
    """Owns an engine and its thread. Every method may be called from any thread.

    The engine is touched by its own thread only: callers leave commands, which run between two steps.

    Args:
        engine: nobody else may use it from here on.

    Attributes:
        num_slots: requests it denoises together; weight_swaps: times it has taken other weights.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.num_slots = int(engine.stats()["slots_free"]) + engine.num_running
        self.weight_swaps = 0
        self._readers: dict[str, _Reader] = {}
        self._commands: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._death: ActorDied | None = None
        self._thread = threading.Thread(target=self._run, name="fewstep-engine", daemon=True)
        self._thread.start()

    @property
    def model(self) -> Transformer:
        """The engine's; for reading what it is, not for running it."""
        return self._engine.model

    @property
    def healthy(self) -> bool:
        """Whether requests are being served."""
        return self._death is None

    def submit(self, request: Request) -> AsyncIterator[Update]:
        """Updates of one request as they become final; the last one carries its trajectory or its error.

        The request starts with the first `async for` step. Leaving the loop early, `aclose()` or a cancelled
        task aborts it.

        Raises:
            RequestError: at once for a request the model cannot serve; while iterating for an id in use.
            ActorDied: while iterating, when the host is closed or its engine has failed.
        """
        request.validate(self._engine.config)
        return self._updates(request)

    async def _updates(self, request: Request) -> AsyncGenerator[Update]:
        reader = _Reader(asyncio.get_running_loop(), asyncio.Queue())
        self._post(lambda: self._open(request, reader))
        try:
            while True:
                item = await reader.queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.last:
                    return
        finally:
            self._try_post(lambda: self._leave(request.request_id, reader))

    def load_weights(self, state: Mapping[str, torch.Tensor], version: WeightVersion) -> None:
        """Swap weights between two steps; blocks until done, so call it from a thread of its own in asyncio.

        Raises:
            CheckpointError: the tensors do not fit; the old weights stay.
            ActorDied: the host is closed or its engine has failed.
        """
        done: Future[None] = Future()

        def swap() -> None:
            if self._death is not None:
                done.set_exception(self._death)
                return
            try:
                self._engine.load_weights(state, version)
            except CheckpointError as error:
                done.set_exception(error)
            except Exception as error:
                done.set_exception(error)
                raise
            else:
                self.weight_swaps += 1
                done.set_result(None)

        self._post(swap)
        done.result()

    def stats(self) -> dict[str, int | str]:
        """Counts of the moment: running, waiting, forwards, rows, committed_tokens, weight_version."""
        engine = self._engine
        return {
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "forwards": engine.forwards,
            "rows": engine.rows,
            "committed_tokens": engine.committed_tokens,
            "weight_version": str(engine.weight_version),
        }

    def measures(self) -> dict[str, float]:
        """`Engine.stats`, with num_slots and weight_swaps; every number is whole, though not all of the same step."""
        return {**self._engine.stats(), "num_slots": self.num_slots, "weight_swaps": self.weight_swaps}

    def close(self) -> None:
        """Stop after the step under way; open requests end with ActorDied. A second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _post(self, command: Callable[[], None]) -> None:
        if not self._try_post(command):
            assert self._death is not None
            raise self._death

    def _try_post(self, command: Callable[[], None]) -> bool:
        with self._changed:
            if self._death is None:
                self._commands.append(command)
                self._changed.notify()
            return self._death is None

    def _run(self) -> None:
        death = ActorDied("engine", "closed")
        try:
            while self._serve():
                pass
        except Exception as error:
            _logger.exception("the engine failed")
            death = ActorDied("engine", f"{type(error).__name__}: {error}")
        with self._changed:
            self._death = death
            late, self._commands = self._commands, []
        for command in late:
            try:
                command()
            except Exception:
                _logger.exception("a command came too late for the engine")
        for reader in self._readers.values():
            reader.put(death)

    def _serve(self) -> bool:
        """Commands, then one step; False once the host is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._commands or self._engine.has_work)
            if self._closing:
                return False
        # One at a time: behind a command that raises, the others stay in the list for `_run` to settle.
        while self._commands:
            with self._changed:
                command = self._commands.pop(0)
            command()
        self._hand_out(self._engine.step())
        return True

    def _hand_out(self, updates: list[Update]) -> None:
        """The updates of one step, all of a loop's in one call: each call wakes the loop, and both want the interpreter."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, Update]]] = {}
        for update in updates:
            reader = self._readers[update.request_id]
            batches.setdefault(reader.loop, []).append((reader, update))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # the loop is closed, so nobody reads any more
                for reader, update in batch:
                    self._leave(update.request_id, reader)
            else:
                for _, update in batch:
                    if update.last:
                        del self._readers[update.request_id]

    def _open(self, request: Request, reader: _Reader) -> None:
        try:
            self._engine.add(request)
        except RequestError as error:
            reader.put(error)
        else:
            self._readers[request.request_id] = reader

    def _leave(self, request_id: str, reader: _Reader) -> None:
        # An ended request's id may already belong to somebody else.
        if self._readers.get(request_id) is reader:
            del self._readers[request_id]
            self._engine.abort(request_id)
