"""The sandbox: a program and a check in, a verdict out. The caller's side; see the package's docstring for the others.

Why a verdict can be believed:

    call    the child is given arguments and sends return values as plain data; the right answers never leave this
            process and are compared here. Whatever a program prints, exits with or overrides is not looked at.
    script  the check runs in a child of its own and reaches the program's functions by messages that pass through
            here. Only that child knows the nonce, and it sends it after `check` returned.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from fewstep.actors.sandbox import values, wire
from fewstep.actors.sandbox.harness import OUT_OF_MEMORY_EXIT
from fewstep.actors.sandbox.launcher import Zygote, ZygoteFailure
from fewstep.platform.errors import ResourceError
from fewstep.platform.records import Check, Outcome, Verdict

_DETAIL_CHARS = 200
_EXIT_GRACE_SECONDS = 0.25
_ATTEMPTS = 2
_CHECKER_FRAME_BYTES = 1 << 26
_SIGKILL = 9
# What a host must offer, and what to do where it does not.
_ALLOW_NAMESPACES = "allow unprivileged user namespaces, or run in a container that has them"
_NEEDS = {
    "auto": (
        "namespaces, or root with seccomp and a user id for every program",
        _ALLOW_NAMESPACES + ', or let programs read and write your files: Sandbox(namespaces="off")',
    ),
    "require": ("namespaces", _ALLOW_NAMESPACES),
    "user": ("user namespaces", _ALLOW_NAMESPACES),
    "off": ("seccomp", "run on a kernel that has it"),
}
_KNOWN_FAILURES: dict[str, Outcome] = {
    "syntax_error": "syntax_error",
    "memory": "memory",
    "wrong_answer": "wrong_answer",
}
_KNOWN_ERRORS: dict[str, Outcome] = {"MemoryError": "memory", "NotPlainData": "wrong_answer"}


@dataclass(frozen=True)
class Limits:
    """Ceilings of one program.

    Attributes:
        memory_bytes: address space.
        processes: processes and threads at once, itself included.
        scratch_bytes: its folder, and any one file.
        open_files: descriptors.
        output_bytes: one returned value, as sent.
        program_bytes: source text; longer ones fail unread.
    """

    memory_bytes: int = 256 << 20
    processes: int = 8
    scratch_bytes: int = 16 << 20
    open_files: int = 32
    output_bytes: int = 1 << 20
    program_bytes: int = 1 << 20


class _ProgramLost(Exception):
    """The program's end of the conversation broke; how it died says why."""


@dataclass
class _Findings:
    """What is known so far about one run."""

    outcome: Outcome
    tests: list[bool]
    detail: str = ""


class Sandbox:
    """Runs untrusted programs, one at a time, and judges them. Thread-safe: callers queue.

    Args:
        limits: ceilings of every program.
        namespaces: auto takes what the host gives, but refuses a host that gives programs neither namespaces nor a
            user id of their own; require refuses a host without namespaces; user takes no more than somebody without
            privileges gets; off does without, and then the user's files may be readable and writable to programs.
    Raises:
        ResourceError: the host cannot isolate as asked.
    """

    def __init__(
        self, limits: Limits | None = None, namespaces: Literal["auto", "require", "user", "off"] = "auto"
    ) -> None:
        self._limits = limits or Limits()
        self._namespaces = namespaces
        self._lock = threading.Lock()
        self._zygote = self._start()

    @property
    def isolation(self) -> str:
        """The layers in force, joined by `+`; each verdict carries them."""
        return self._zygote.isolation

    @property
    def zygote_pid(self) -> int:
        """The process that forks the programs."""
        return self._zygote.pid

    def run(self, program: str, check: Check, timeout_s: float) -> Verdict:
        """Runs one program against its check.

        Args:
            timeout_s: wall seconds for all of it, from the moment the child is confined.
        Raises:
            ValueError: the check itself is malformed.
        """
        _validate(check, timeout_s)
        failure = ZygoteFailure()
        started = time.monotonic()
        with self._lock:
            for _ in range(_ATTEMPTS):
                try:
                    return self._judge(program, check, timeout_s)
                except ZygoteFailure as error:
                    failure = error
                    self._restart()
                except BaseException:
                    self._restart()  # an interrupted check leaves children behind
                    raise
        seconds = time.monotonic() - started
        return Verdict("sandbox_error", 0.0, (), seconds, self.isolation, str(failure)[:_DETAIL_CHARS])

    def run_many(self, jobs: Sequence[tuple[str, Check, float]]) -> list[Verdict]:
        """`run` for each (program, check, timeout_s), in order."""
        return [self.run(*job) for job in jobs]

    def close(self) -> None:
        """Ends the zygote. The sandbox cannot be used afterwards."""
        with self._lock:
            self._zygote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> Zygote:
        limits = asdict(self._limits)
        caps = {name: limits[name] for name in ("memory_bytes", "processes", "scratch_bytes", "open_files")}
        try:
            return Zygote(caps, self._namespaces)
        except ZygoteFailure as error:
            allowed, fix = _NEEDS[self._namespaces]
            raise ResourceError(
                "sandbox isolation", f"a host that refuses ({error})", allowed, fix
            ) from error

    def _restart(self) -> None:
        self._zygote.close()
        self._zygote = self._start()

    def _judge(self, program: str, check: Check, timeout_s: float) -> Verdict:
        total = len(check.inputs) if check.kind == "call" else 1
        if len(program.encode("utf-8", "surrogatepass")) > self._limits.program_bytes:
            detail = f"the program is longer than {self._limits.program_bytes} bytes"
            return Verdict("runtime_error", 0.0, (), 0.0, self.isolation, detail)
        found = _Findings("passed", [])
        connection = self._zygote.spawn(timeout_s)
        started = time.monotonic()
        grace = 0.0
        try:
            with connection:
                if check.kind == "call":
                    self._run_calls(connection, program, check, started + timeout_s, found)
                else:
                    self._run_script(connection, program, check, started + timeout_s, found)
        except TimeoutError:
            found.outcome, found.detail = "timeout", f"no answer within {timeout_s:g} s"
        except _ProgramLost as error:
            found.detail = str(error)
            found.outcome, grace = "runtime_error", _EXIT_GRACE_SECONDS
        seconds = time.monotonic() - started
        statuses = self._zygote.end(grace)
        if grace:
            _explain_death(found, statuses[0])
        passed = found.outcome == "passed"
        score = 1.0 if passed else sum(found.tests) / total
        return Verdict(
            found.outcome, score, tuple(found.tests), seconds, self.isolation, found.detail[:_DETAIL_CHARS]
        )

    def _ask(self, connection: socket.socket, message: Any, deadline: float) -> dict[str, Any]:
        """Sends (unless None) and waits for the program's next frame."""
        try:
            if message is not None:
                wire.send(connection, message, deadline)
            reply = wire.receive(connection, self._limits.output_bytes, deadline)
        except TimeoutError:
            raise
        except (OSError, EOFError) as error:
            raise _ProgramLost("the program ended early") from error
        except wire.FrameTooLarge as error:
            raise _ProgramLost(f"an answer of {error}") from error
        except (ValueError, RecursionError) as error:
            raise _ProgramLost("the program wrote on its answer channel") from error
        if not isinstance(reply, dict):
            raise _ProgramLost("the program wrote on its answer channel")
        return reply

    def _load(
        self, connection: socket.socket, program: str, check: Check, calls: list[Any] | None, deadline: float
    ) -> dict[str, Any] | None:
        """Hands the program over. Returns None once it is loaded, or the reply that says why it is not."""
        order = {"role": "program", "program": program, "entry_point": check.entry_point, "calls": calls}
        reply = self._ask(connection, order, deadline)
        return None if reply.get("loaded") is True else reply

    def _run_calls(
        self, connection: socket.socket, program: str, check: Check, deadline: float, found: _Findings
    ) -> None:
        calls = [[values.encode(argument) for argument in arguments] for arguments in check.inputs]
        answers = [values.encode(expected) for expected in check.expected]
        failure = self._load(connection, program, check, calls, deadline)
        if failure is not None:
            _note_failure(found, failure)
            return
        for answer in answers:
            reply = self._ask(connection, None, deadline)
            right = "value" in reply and values.same(answer, reply["value"])
            found.tests.append(right)
            if right or found.outcome != "passed":
                continue
            if "value" in reply:
                found.outcome, found.detail = (
                    "wrong_answer",
                    f"call {len(found.tests) - 1} returned something else",
                )
            else:
                _note_raised(found, reply)

    def _run_script(
        self, connection: socket.socket, program: str, check: Check, deadline: float, found: _Findings
    ) -> None:
        failure = self._load(connection, program, check, None, deadline)
        if failure is not None:
            _note_failure(found, failure)
            return
        nonce = secrets.token_hex(16)
        order = {
            "role": "checker",
            "test_code": check.test_code,
            "entry_point": check.entry_point,
            "nonce": nonce,
        }
        with self._zygote.spawn(max(0.0, deadline - time.monotonic())) as checker:
            message: Any = order
            while True:
                try:
                    wire.send(checker, message, deadline)
                    answer = wire.receive(checker, _CHECKER_FRAME_BYTES, deadline)
                except (EOFError, ConnectionError) as error:
                    found.outcome, found.detail = "sandbox_error", f"the check's process ended: {error}"
                    return
                if "call" not in answer:
                    break
                message = self._ask(connection, answer["call"], deadline)
        if answer.get("passed") == nonce:
            found.tests.append(True)
        elif "broken" in answer:
            found.outcome, found.detail = "sandbox_error", f"the check itself fails: {answer['broken']}"
        else:
            found.tests.append(False)
            _note_failure(found, answer)


def _validate(check: Check, timeout_s: float) -> None:
    if timeout_s <= 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s}")
    if check.kind == "call" and not (check.inputs and len(check.inputs) == len(check.expected)):
        raise ValueError(
            f"a call check needs as many expected values as inputs, at least one: {check.entry_point}"
        )
    if check.kind == "script" and not check.test_code:
        raise ValueError(f"a script check needs test_code: {check.entry_point}")


def _note_failure(found: _Findings, reply: dict[str, Any]) -> None:
    found.outcome = _KNOWN_FAILURES.get(str(reply.get("failed")), "runtime_error")
    found.detail = str(reply.get("detail", "the program wrote on its answer channel"))


def _note_raised(found: _Findings, reply: dict[str, Any]) -> None:
    found.outcome = _KNOWN_ERRORS.get(str(reply.get("kind")), "runtime_error")
    found.detail = str(reply.get("raised", "the program wrote on its answer channel"))


def _explain_death(found: _Findings, status: int | None) -> None:
    """Reads the exit status of a program that fell silent; only ever chooses between kinds of failure."""
    # Nobody but the kernel's memory killer sends SIGKILL to a program that the zygote has not killed yet.
    if status in (OUT_OF_MEMORY_EXIT, -_SIGKILL):
        found.outcome = "memory"
    if status is not None:
        found.detail += f" (killed by signal {-status})" if status < 0 else f" (exit status {status})"
