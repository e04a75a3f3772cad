"""Starts the zygote, orders children from it and restarts it when it dies: the caller's half of zygote.py."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.actors.sandbox import wire
from fewstep.actors.sandbox.isolation import plans

_START_SECONDS = 60.0
_ANSWER_SECONDS = 20.0
_READY_BYTES = 1000
# The packages' own __init__ files import what the bare interpreter lacks, so empty stand-ins take their place.
_BOOTSTRAP = """
import json, sys, types
folder, control, settings = sys.argv[1:]
for name, path in (("fewstep", []), ("fewstep.actors", []), ("fewstep.actors.sandbox", [folder])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
from fewstep.actors.sandbox import zygote
zygote.main(int(control), json.loads(settings))
"""


class ZygoteFailure(Exception):
    """The zygote died, does not answer or could not make a child."""


class Zygote:
    """A running zygote. Not thread-safe: one check at a time.

    Args:
        caps: ceilings of a child (isolation.Caps).
        namespaces: see sandbox.Sandbox.
        shown: folders beside the system's own that children may read.
    Raises:
        ZygoteFailure: it did not start; the message says what the host refused.
    """

    def __init__(self, caps: dict[str, int], namespaces: str, shown: Sequence[str] = ()) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {"caps": caps, "plans": [vars(plan) for plan in plans(namespaces)], "shown": list(shown)}
        folder = str(Path(__file__).resolve().parent)
        with theirs:
            descriptor = theirs.fileno()
            command = [sys.executable, "-s", "-P", "-S", "-B", "-c", _BOOTSTRAP]
            self._process = subprocess.Popen(
                [*command, folder, str(descriptor), json.dumps(settings)],
                # Set order is a verdict's business: the same program must get the same one from every zygote.
                env={"PYTHONHASHSEED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[descriptor],
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the owner, who then closes the control socket
            )
        try:
            hello = self._answer(_START_SECONDS)
            if "layers" not in hello:
                raise ZygoteFailure(hello.get("refused", "no reason given"))
        except ZygoteFailure:
            self.close()
            raise
        self.isolation = "+".join(hello["layers"])

    @property
    def pid(self) -> int:
        return self._process.pid

    def spawn(self, timeout_s: float, caps: dict[str, int] | None = None) -> socket.socket:
        """A confined child that has reported ready; orders and replies go over the returned socket.

        Args:
            timeout_s: CPU seconds of any one of its processes, a second less than the kernel enforces.
            caps: other ceilings than the zygote's.
        Raises:
            ZygoteFailure: no child, or one that could not be confined.
        """
        ours, theirs = socket.socketpair()
        order = {"op": "spawn", "cpu_seconds": math.ceil(timeout_s) + 1, "caps": caps}
        try:
            with theirs:
                self._order(order, [theirs.fileno()])
            wire.receive(ours, _READY_BYTES, time.monotonic() + _ANSWER_SECONDS)
        except (OSError, EOFError, ValueError) as error:
            ours.close()
            raise ZygoteFailure(f"a child was not confined: {error}") from error
        except ZygoteFailure:
            ours.close()
            raise
        return ours

    def end(self, grace: float = 0.0) -> list[int | None]:
        """Kills every child and all it started; see zygote.py for the statuses.

        Raises:
            ZygoteFailure: the zygote is gone.
        """
        statuses: list[int | None] = self._order({"op": "end", "grace": grace}, [])["statuses"]
        return statuses

    def close(self) -> None:
        """Ends the zygote and, with it, whatever it still had."""
        self._control.close()
        try:
            self._process.wait(_ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()

    def _order(self, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
        except OSError as error:
            raise ZygoteFailure(f"the zygote is gone: {error}") from error
        return self._answer(_ANSWER_SECONDS)

    def _answer(self, seconds: float) -> dict[str, Any]:
        self._control.settimeout(seconds)
        try:
            data = self._control.recv(1 << 16)
        except OSError as error:
            raise ZygoteFailure(f"the zygote does not answer: {error}") from error
        if not data:
            raise ZygoteFailure("the zygote died")
        answer: dict[str, Any] = json.loads(data)
        return answer
