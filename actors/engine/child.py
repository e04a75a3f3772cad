"""The process that `EngineHost` starts: commands come in by a socket, the outcome of each step goes out by it.

Everything else of the server is in the parent. Whatever becomes of the parent, its end of the socket closes with it, and
then this process ends: after the step under way, or without it if that takes long. A death signal of Linux
(PR_SET_PDEATHSIG) would come with the end of the thread that started us, not of the process.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from fewstep.actors.engine.request import Request, Update
from fewstep.platform.errors import CheckpointError, FewstepError, RequestError, UserError
from fewstep.platform.records import WeightVersion

if TYPE_CHECKING:
    import torch

    from fewstep.actors.engine.engine import Engine
    from fewstep.actors.engine.host import ReadWeights

logger = logging.getLogger(__name__)

# What a step may still take once the parent is gone.
_GRACE_S = 1.0
# Counts of steps that made nothing final are sent this often.
_COUNTS_S = 0.05

# number of the request, then the fields of `Update` after its id
_Row = tuple[int, str, int, Any, Any, Any]


class Inbox:
    """Commands of the parent, read by a thread of their own so that its end is seen at any time.

    The thread reads bytes and no more: to unpickle the first command imports torch, which may take seconds.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._commands: list[bytes | tuple[Any, ...]] = []
        self._changed = threading.Condition()
        self.closing = False
        threading.Thread(target=self._read, name="fewstep-commands", daemon=True).start()

    def post(self, command: bytes | tuple[Any, ...]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def take(self, *, wait: bool) -> list[tuple[Any, ...]]:
        """All commands there are; with `wait` at least one, unless the parent is gone."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self.closing or self._commands)
            found, self._commands = self._commands, []
        return [pickle.loads(command) if isinstance(command, bytes) else command for command in found]

    def _read(self) -> None:
        try:
            while True:
                self.post(self._connection.recv_bytes())
        except (EOFError, OSError):
            pass
        with self._changed:
            self.closing = True
            self._changed.notify()
        time.sleep(_GRACE_S)
        os._exit(0)


class EngineLoop:
    """Drives one engine on the calling thread: commands, a step, one message.

    Args:
        engine: nobody else may use it from here on.
    """

    def __init__(self, engine: Engine, inbox: Inbox, connection: Connection) -> None:
        self._engine, self._inbox, self._connection = engine, inbox, connection
        self._numbers: dict[str, int] = {}
        self._requests: dict[int, str] = {}
        self._refused: list[tuple[int, Exception]] = []
        self._calls: list[tuple[int, Exception | None]] = []
        self._handlers: dict[str, Callable[..., None]] = {
            "open": self._open, "leave": self._leave, "swap": self._swap, "take": self._take, "answer": self._answer,
        }  # fmt: skip
        self._swaps = 0
        self._sent = 0.0

    def run(self) -> None:
        """Until the parent closes the socket or is gone.

        Raises: whatever the engine does; the parent has been told.
        """
        stats = self._engine.stats()
        num_slots = int(stats["slots_free"]) + self._engine.num_running
        self._send((self._engine.config, tuple(stats), num_slots, self._counts()))
        try:
            while not self._inbox.closing:
                self._serve()
        except OSError:
            if not self._inbox.closing:  # the parent went away while we were sending
                raise
        except Exception as error:
            self._send(f"{type(error).__name__}: {error}")
            raise

    def _serve(self) -> None:
        commands = self._inbox.take(wait=not self._engine.has_work)
        for name, number, *rest in commands:
            self._handlers[name](number, *rest)
        rows = [self._row(update) for update in self._engine.step()]
        # The parent is not woken for nothing; what it shows of a step that made nothing final may be a little old.
        now = time.monotonic()
        if rows or commands or now - self._sent > _COUNTS_S:
            self._sent = now
            self._send((self._counts(), rows, self._refused, self._calls))
            self._refused, self._calls = [], []

    def _open(self, number: int, request: Request) -> None:
        try:
            self._engine.add(request)
        except RequestError as error:
            self._refused.append((number, error))
        else:
            self._numbers[request.request_id] = number
            self._requests[number] = request.request_id

    def _leave(self, number: int) -> None:
        request_id = self._requests.pop(number, None)
        if request_id is not None:  # otherwise it has ended in the meantime
            del self._numbers[request_id]
            self._engine.abort(request_id)

    def _swap(self, number: int, read: ReadWeights) -> None:
        def work() -> None:
            try:
                state, version = read(self._engine)
            except UserError as error:
                self._inbox.post(("answer", number, error))
            except Exception as error:
                logger.exception("the weights cannot be read")
                self._inbox.post(("answer", number, FewstepError(f"{type(error).__name__}: {error}")))
            else:
                self._inbox.post(("take", number, state, version))

        threading.Thread(target=work, name="fewstep-weights", daemon=True).start()

    def _take(self, number: int, state: Mapping[str, torch.Tensor], version: WeightVersion) -> None:
        try:
            self._engine.load_weights(state, version)
        except CheckpointError as error:
            self._answer(number, error)
        else:
            self._swaps += 1
            self._answer(number, None)

    def _answer(self, number: int, error: Exception | None) -> None:
        self._calls.append((number, error))

    def _row(self, update: Update) -> _Row:
        number = self._numbers[update.request_id]
        if update.last:
            del self._numbers[update.request_id], self._requests[number]
        return number, update.text, update.num_new_tokens, update.trajectory, update.error, update.canvas

    def _counts(self) -> tuple[Any, ...]:
        return str(self._engine.weight_version), self._swaps, *self._engine.stats().values()

    def _send(self, message: object) -> None:
        self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def main() -> int:
    """`python -m fewstep.actors.engine.child DESCRIPTOR`; 1 when the engine was refused or has failed."""
    faulthandler.enable()  # a crash in native code says where
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    logging.basicConfig(format="%(levelname)s engine: %(message)s")
    logging.getLogger("fewstep").setLevel(logging.INFO)
    connection = Connection(int(sys.argv[1]))
    inbox = Inbox(connection)
    commands = inbox.take(wait=True)
    if not commands:
        return 0
    try:
        engine = commands[0][0]()
    except UserError as error:
        connection.send_bytes(pickle.dumps(error, pickle.HIGHEST_PROTOCOL))
        return 1
    EngineLoop(engine, inbox, connection).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
