"""A warm interpreter that forks children for the sandbox, so that a verdict costs milliseconds.

Started by `launcher.Zygote` with nothing but the standard library. It learns what to isolate and when to fork; programs,
inputs and checks go from the caller straight to the child, on a socket that is passed through, so no child can find
another one's in the memory it was forked from.

Control messages (SOCK_SEQPACKET, JSON): {"op": "spawn", "cpu_seconds": n, "caps": {...} or null for the usual ones} with
one descriptor -> {"spawned": true};
{"op": "end", "grace": seconds} kills and reaps all children -> {"statuses": [...]}, in spawn order: an exit status, minus
a signal number, or null for a child that was alive and was killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fewstep.actors.sandbox import harness, linux
from fewstep.actors.sandbox.isolation import Caps, Isolation, Plan

PLAN_REFUSED = 99
_REAP_SECONDS = 5.0
_OPEN_FILES = 4096
# Imported before the first fork because programs ask for them; an import in the child would cost every verdict.
_WARM_MODULES = [
    "bisect",
    "collections",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "typing",
]


def main(control_descriptor: int, settings: dict[str, Any]) -> None:
    """Tries the plans in order, serves the first that works; exits with PLAN_REFUSED if none does."""
    _lower_open_files()
    # The lowest free number: every child closes what lies between its own descriptors and the limit, no more.
    control = socket.socket(fileno=os.dup(control_descriptor))
    os.close(control_descriptor)
    # Under memory pressure the kernel should take the sandbox, not its owner.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    os.environ.clear()
    for name in _WARM_MODULES:
        importlib.import_module(name)
    refusals = []
    for plan in settings["plans"]:
        reader, writer = os.pipe()
        attempt = os.fork()
        if attempt == 0:
            os.close(reader)
            isolation = Isolation(Plan(**plan), tuple(settings["shown"]))
            _attempt(control, isolation, Caps(**settings["caps"]), writer)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            refusals.append(pipe.read())
        code = os.waitstatus_to_exitcode(os.waitpid(attempt, 0)[1])
        if code != PLAN_REFUSED:
            sys.exit(code & 0xFF)
    control.send(json.dumps({"refused": "; ".join(refusals)}).encode()[:60_000])
    sys.exit(PLAN_REFUSED)


def _lower_open_files() -> None:
    """At most _OPEN_FILES descriptors from here on. Where close_range(2) is missing a child closes one number after the
    other up to the hard limit, and hosts set that as high as 10^9."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > _OPEN_FILES:
        soft = _OPEN_FILES if soft == resource.RLIM_INFINITY else min(soft, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, _OPEN_FILES))


def _attempt(control: socket.socket, isolation: Isolation, caps: Caps, refusal: int) -> None:
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        isolation.enter()
        zygote = Zygote(control, isolation, caps)
        zygote.self_test()
    except (OSError, ImportError) as error:
        os.write(refusal, str(error).encode()[:1000])
        os._exit(PLAN_REFUSED)
    os.close(refusal)
    zygote.serve()
    os._exit(0)


class Zygote:
    """The children of one check, and their end."""

    def __init__(self, control: socket.socket, isolation: Isolation, caps: Caps) -> None:
        self._control = control
        self._isolation = isolation
        self._caps = caps
        self._children: list[int] = []
        self._scratch: list[str] = []

    def self_test(self) -> None:
        """One child goes through every layer, forks if it should be able to, and imports from the new root.

        Raises:
            OSError: it could not.
        """
        reader, writer = socket.socketpair()
        with reader, writer:
            self.spawn(writer.fileno(), 10, self._caps, _probe)
            writer.close()
            answer = reader.recv(1000)
        self.end(grace=_REAP_SECONDS)
        if answer != b"ok":
            raise OSError(f"self-test: {answer.decode(errors='replace') or 'the child died'}")

    def serve(self) -> None:
        """Answers control messages until the other end closes."""
        gc.collect()
        gc.freeze()  # children would otherwise copy every page the collector touches
        self._control.send(json.dumps({"layers": self._isolation.layers}).encode())
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._control, 4096, 1)
            if not data:
                self.end(grace=0.0)
                return
            message = json.loads(data)
            if message["op"] == "spawn":
                caps = Caps(**message["caps"]) if message["caps"] else self._caps
                self.spawn(descriptors[0], message["cpu_seconds"], caps, harness.main)
                os.close(descriptors[0])
                reply: dict[str, Any] = {"spawned": True}
            else:
                reply = {"statuses": self.end(message["grace"])}
            self._control.send(json.dumps(reply).encode())

    def spawn(
        self, connection: int, cpu_seconds: int, caps: Caps, body: Callable[[socket.socket], None]
    ) -> None:
        """Forks one confined child that runs `body(connection)`."""
        scratch = self._isolation.make_scratch()
        if scratch is not None:
            self._scratch.append(scratch)
        slot = len(self._children)
        child = self._isolation.fork()
        if child:
            self._children.append(child)
            return
        try:
            descriptor = self._isolation.confine(connection, slot, cpu_seconds, caps, scratch)
        except OSError as error:
            with suppress(OSError):
                os.write(connection, str(error).encode())
            os._exit(PLAN_REFUSED)
        try:
            body(socket.socket(fileno=descriptor))
        finally:
            os._exit(1)

    def end(self, grace: float) -> list[int | None]:
        """Kills and reaps everything the children left behind and removes their folders.

        Args:
            grace: seconds to let a dying child report its own exit status first.
        """
        deadline = time.monotonic() + grace
        statuses = [self._end_child(child, deadline) for child in self._children]
        self._sweep()
        for folder in self._scratch:
            self._isolation.remove_scratch(folder)
        self._children.clear()
        self._scratch.clear()
        return statuses

    def _end_child(self, child: int, deadline: float) -> int | None:
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid or time.monotonic() >= deadline:
                break
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if pid:
            return os.waitstatus_to_exitcode(status)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None

    def _sweep(self) -> None:
        """Kills what escaped its group. Orphans come to the zygote (subreaper), so when it has no children left,
        nothing is left; in a pid namespace the kernel has done it already."""
        deadline = time.monotonic() + _REAP_SECONDS
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                for orphan in _children_of(os.getpid()):
                    with suppress(ProcessLookupError):
                        os.kill(orphan, signal.SIGKILL)
                if time.monotonic() > deadline:
                    sys.exit("processes of a program outlive SIGKILL")
                time.sleep(0.001)


def _children_of(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat") as file:
                # The command name may hold spaces and brackets; the fields after the last bracket are state, parent.
                if int(file.read().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(name))
    return found


def _probe(connection: socket.socket) -> None:
    try:
        importlib.import_module("colorsys")  # any module that is not loaded yet
        with open("probe", "w") as file:
            file.write("x")
        os.remove("probe")
        connection.send(b"ok")
    except (OSError, ImportError) as error:
        connection.send(str(error).encode()[:1000])
