"""The sandbox: a program and a check in, a verdict out. The caller's side; see the package's docstring for the others.

Why a verdict can be believed:

    call    the child is given arguments and sends return values as plain data; the right answers never leave this
            process and are compared here. Whatever a program prints, exits with or overrides is not looked at.
    script  the check runs in a child of its own and reaches the program's functions by messages that pass through
            here. Only that child knows the nonce, and it sends it after `check` returned.
    stdin   the program is executed once an input; what it prints is compared here.
    source  program and tests are one program of any language; see languages.py for the seal, which is weaker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, TypeVar

from fewstep.actors.sandbox.commands import CommandCheck
from fewstep.actors.sandbox.conversation import Conversation, Findings, ProgramLost
from fewstep.actors.sandbox.harness import OUT_OF_MEMORY_EXIT
from fewstep.actors.sandbox.languages import LANGUAGES, Toolchain, find_toolchains, shown_folders
from fewstep.actors.sandbox.launcher import Zygote, ZygoteFailure
from fewstep.actors.sandbox.python_checks import answers, load_for_script, run_calls, run_script
from fewstep.platform.errors import ResourceError
from fewstep.platform.records import Check, Verdict

_DETAIL_CHARS = 200
_Result = TypeVar("_Result")

_EXIT_GRACE_SECONDS = 0.25
_ATTEMPTS = 2
_PROBE_SECONDS = 30.0
_TRUSTED_FRAME_BYTES = 1 << 26  # of a checker or a supervisor, which is our own code
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


@dataclass(frozen=True)
class Limits:
    """Ceilings of one program.

    Attributes:
        memory_bytes: address space; what a language's runtime reserves for itself comes on top.
        processes: processes and threads at once, itself included.
        scratch_bytes: its folder, and any one file.
        open_files: descriptors.
        output_bytes: one returned value, as sent, or what one run prints.
        program_bytes: source text; longer ones fail unread.
        tool_processes, tool_scratch_bytes, tool_open_files: instead, where compilers and runtimes are at work.
    """

    memory_bytes: int = 256 << 20
    processes: int = 8
    scratch_bytes: int = 16 << 20
    open_files: int = 32
    output_bytes: int = 1 << 20
    program_bytes: int = 1 << 20
    tool_processes: int = 64
    tool_scratch_bytes: int = 128 << 20
    tool_open_files: int = 256

    def caps(self) -> dict[str, int]:
        """The ceilings of a child as isolation.Caps."""
        limits = asdict(self)
        return {name: limits[name] for name in ("memory_bytes", "processes", "scratch_bytes", "open_files")}

    def tool_caps(self, reserved_bytes: int) -> dict[str, int]:
        """Those of a child that executes commands."""
        return {
            "memory_bytes": self.memory_bytes + reserved_bytes,
            "processes": self.tool_processes,
            "scratch_bytes": self.tool_scratch_bytes,
            "open_files": self.tool_open_files,
        }


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
        self,
        limits: Limits | None = None,
        namespaces: Literal["auto", "require", "user", "off"] = "auto",
    ) -> None:
        self._limits = limits or Limits()
        self._namespaces = namespaces
        self._lock = threading.Lock()
        self._toolchains = find_toolchains()
        self._probed: dict[str, str] = {}
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
        started = time.monotonic()
        try:
            return self._again_if_it_breaks(lambda: self._judge(program, check, timeout_s))
        except ZygoteFailure as error:
            seconds = time.monotonic() - started
            return Verdict("sandbox_error", 0.0, (), seconds, self.isolation, str(error)[:_DETAIL_CHARS])

    def _again_if_it_breaks(self, work: Callable[[], _Result]) -> _Result:
        with self._lock:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    return work()
                except ZygoteFailure:
                    self._restart()
                    if attempt == _ATTEMPTS:
                        raise
                except BaseException:
                    self._restart()  # an interrupted check leaves children behind
                    raise
        raise AssertionError("every attempt returns or raises")

    def run_many(self, jobs: Sequence[tuple[str, Check, float]]) -> list[Verdict]:
        """`run` for each (program, check, timeout_s), in order."""
        return [self.run(*job) for job in jobs]

    def values(
        self, program: str, entry_point: str, inputs: Sequence[tuple[Any, ...]], timeout_s: float
    ) -> list[Any] | str:
        """What a program's function returns for each input, as trees of values.encode; or why there is no such list.

        For programs that come with a task: their answers are what others are held against.
        """
        check = Check("call", entry_point, inputs=tuple(inputs))
        found, replies = Findings("passed", []), list[dict[str, Any]]()

        def work() -> None:
            replies.clear()
            connection = self._zygote.spawn(timeout_s)
            deadline = time.monotonic() + timeout_s

            def converse() -> None:
                with connection:
                    child = Conversation(connection, self._limits.output_bytes)
                    replies.extend(answers(child, program, check, deadline, found))

            self._end_of(converse, timeout_s, found)

        self._again_if_it_breaks(work)
        if found.outcome != "passed":
            return f"{found.outcome}: {found.detail}"
        raised = [reply["raised"] for reply in replies if "value" not in reply]
        return f"runtime_error: {raised[0]}" if raised else [reply["value"] for reply in replies]

    def missing(self, language: str) -> str:
        """Why programs of a language cannot be executed here; "" = they can. The first time, a small one is tried."""
        if language not in self._probed:
            self._probed[language] = self._probe(language)
        return self._probed[language]

    def _probe(self, language: str) -> str:
        if language not in LANGUAGES:
            return f"{language}: this sandbox has no way to run it"
        if language not in self._toolchains:
            return f"{language}: {' or '.join(LANGUAGES[language].needs)} not found"
        program, tests = LANGUAGES[language].probe
        verdict = self.run(program, Check("source", "f", test_code=tests, language=language), _PROBE_SECONDS)
        if verdict.passed:
            return ""
        return f"{language}: does not work under {self.isolation} ({verdict.outcome}: {verdict.detail})"

    def close(self) -> None:
        """Ends the zygote. The sandbox cannot be used afterwards."""
        with self._lock:
            self._zygote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> Zygote:
        shown = shown_folders(list(self._toolchains.values()))
        try:
            return Zygote(self._limits.caps(), self._namespaces, shown)
        except ZygoteFailure as error:
            allowed, fix = _NEEDS[self._namespaces]
            raise ResourceError(
                "sandbox isolation", f"a host that refuses ({error})", allowed, fix
            ) from error

    def _restart(self) -> None:
        self._zygote.close()
        self._zygote = self._start()

    def _judge(self, program: str, check: Check, timeout_s: float) -> Verdict:
        if len(program.encode("utf-8", "surrogatepass")) > self._limits.program_bytes:
            detail = f"the program is longer than {self._limits.program_bytes} bytes"
            return Verdict("runtime_error", 0.0, (), 0.0, self.isolation, detail)
        found = Findings("passed", [])
        if check.kind in ("call", "script"):
            seconds = self._run_python(program, check, timeout_s, found)
        elif (toolchain := self._toolchains.get(check.language)) is not None:
            seconds = self._run_commands(toolchain, program, check, timeout_s, found)
        else:
            found.note("sandbox_error", self.missing(check.language))
            seconds = 0.0
        total = {"call": len(check.inputs), "stdin": len(check.inputs), "script": len(check.parts)}
        score = 1.0 if found.outcome == "passed" else sum(found.tests) / total.get(check.kind, 1)
        detail = found.detail[:_DETAIL_CHARS]
        return Verdict(found.outcome, score, tuple(found.tests), seconds, self.isolation, detail)

    def _run_python(self, program: str, check: Check, timeout_s: float, found: Findings) -> float:
        connection = self._zygote.spawn(timeout_s)
        deadline = time.monotonic() + timeout_s

        def converse() -> None:
            with connection:
                child = Conversation(connection, self._limits.output_bytes)
                if check.kind == "call":
                    run_calls(child, program, check, deadline, found)
                elif load_for_script(child, program, check, deadline, found):
                    with self._zygote.spawn(max(0.0, deadline - time.monotonic())) as checker:
                        trusted = Conversation(checker, _TRUSTED_FRAME_BYTES)
                        run_script(child, trusted, check, deadline, found)

        return self._end_of(converse, timeout_s, found)

    def _run_commands(
        self, toolchain: Toolchain, program: str, check: Check, timeout_s: float, found: Findings
    ) -> float:
        limits = self._limits
        job = CommandCheck(toolchain, program, check, timeout_s, limits.memory_bytes, limits.output_bytes)
        connection = self._zygote.spawn(job.cpu_seconds, limits.tool_caps(toolchain.language.reserved_bytes))

        def converse() -> None:
            with connection:
                job.run(Conversation(connection, _TRUSTED_FRAME_BYTES), found)

        return self._end_of(converse, timeout_s, found)

    def _end_of(self, converse: Callable[[], None], timeout_s: float, found: Findings) -> float:
        """Holds a conversation, ends everything it started and says how many seconds it took."""
        started = time.monotonic()
        lost = False
        try:
            converse()
        except TimeoutError:
            found.outcome, found.detail = "timeout", f"no answer within {timeout_s:g} s"
        except ProgramLost as error:
            lost = True
            found.outcome, found.detail = "runtime_error", str(error)
        seconds = time.monotonic() - started
        statuses = self._zygote.end(_EXIT_GRACE_SECONDS if lost else 0.0)
        if lost:
            _explain_death(found, statuses[0])
        return seconds


def require_layers(isolation: str, required: Sequence[str]) -> None:
    """Refuse an isolation that lacks a layer.

    Args:
        isolation: layers in force, joined by `+`.
        required: names of isolation.py, such as `pidns` and `netns`.
    Raises:
        ResourceError: says which are lacking.
    """
    if lacking := sorted(set(required) - set(isolation.split("+"))):
        raise ResourceError(
            "sandbox isolation",
            f"{isolation}, without {', '.join(lacking)}",
            "a host that gives every required layer",
            _ALLOW_NAMESPACES + ", or require less",
        )


def _validate(check: Check, timeout_s: float) -> None:
    if check.kind == "reference":
        raise ValueError(f"a check of kind reference has nothing to run: {check.entry_point}")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s}")
    if check.kind in ("call", "stdin") and not (check.inputs and len(check.inputs) == len(check.expected)):
        raise ValueError(
            f"a {check.kind} check needs as many expected values as inputs, at least one: {check.entry_point}"
        )
    if check.kind in ("script", "source") and not check.test_code:
        raise ValueError(f"a {check.kind} check needs test_code: {check.entry_point}")
    if (check.kind != "source" or check.module) and check.language != "python":
        raise ValueError(f"a {check.kind} check of {check.language}: only one of `source` in one file can be")


def _explain_death(found: Findings, status: int | None) -> None:
    """Reads the exit status of a program that fell silent; only ever chooses between kinds of failure."""
    # Nobody but the kernel's memory killer sends SIGKILL to a program that the zygote has not killed yet.
    if status in (OUT_OF_MEMORY_EXIT, -_SIGKILL):
        found.outcome = "memory"
    if status is not None:
        found.detail += f" (killed by signal {-status})" if status < 0 else f" (exit status {status})"
