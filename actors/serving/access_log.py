"""One JSON line a request: who, what, how long, how many tokens. No text of prompts or answers unless asked for."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from fewstep.actors.serving.visit import Visit
from fewstep.platform.config import Config


class LogConfig(Config):
    """Where requests are logged."""

    file: Path | None = None
    """A file that lines of JSON are added to, by every replica on its own node; null = standard error."""
    prompts: bool = False
    """Also log the body of each request: what people typed, in plain text."""


class AccessLog:
    """Writes whole lines; several processes may share a file.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, config: LogConfig) -> None:
        self.prompts = config.prompts
        if config.file is None:
            self._descriptor = sys.stderr.fileno()
        else:
            config.file.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(config.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def request(self, visit: Visit, seconds: float) -> None:
        """The line of one request that is over."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(visit.started_at, UTC).isoformat(timespec="milliseconds"),
            "event": "request",
            "pid": os.getpid(),
            **dict(visit.fields(seconds)),
        }
        if self.prompts:
            line["body"] = visit.body.decode(errors="replace")
        # ASCII, so that text a client sent cannot break a line or a terminal; one write, so that lines stay whole.
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())
