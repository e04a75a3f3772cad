"""An adapter's process: started in its own environment, asked in JSON lines, ended with us."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Message = dict[str, Any]


class AdapterError(Exception):
    """An adapter failed or fell silent; one line. Its row is lost, the others go on."""


class AdapterProcess:
    """Owns one adapter.

    Args:
        name: what errors call it.
        python: the interpreter of its environment.
        script: the adapter.
        log: where its stderr goes.
        environment: added to a copy of ours.
        timeout_s: for one answer.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        script: Path,
        log: Path,
        environment: Mapping[str, str],
        timeout_s: float = 3600.0,
    ) -> None:
        self.name, self.timeout_s, self.log = name, timeout_s, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stderr:
            # A session of its own: Ctrl-C ends us, and we end it.
            self._process = subprocess.Popen(
                [str(python), str(script)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=os.environ | dict(environment), start_new_session=True,
            )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, **message: Any) -> Message:
        """The reply to one message.

        Raises:
            AdapterError: it answered with an error, ended, or did not answer in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=self.timeout_s)
        except queue.Empty:
            self.end()
            raise AdapterError(
                f"{self.name}: no answer to {message['op']} within {self.timeout_s:.0f} s"
            ) from None
        except OSError:
            line = None
        if line is None:
            raise AdapterError(
                f"{self.name}: ended during {message['op']}; its last words are in {self.log.name}"
            )
        reply: Message = json.loads(line)
        if "error" in reply:
            raise AdapterError(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Ask it to end, and make it if it does not."""
        if self._process.poll() is None:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write('{"op": "close"}\n')
                self._process.stdin.close()
                self._process.wait(timeout=20)
            except (OSError, subprocess.TimeoutExpired):
                pass
        self.end()

    def end(self) -> None:
        """Kill it if it still runs, with what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
