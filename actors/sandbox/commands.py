"""Checks that execute commands: tests in the program's own process (`source`), and programs that print (`stdin`).

The caller's side. The supervisor in the sandbox writes the files and executes what it is told to; which files and which
commands is decided here, and so is what an exit status or a printed line means. See languages.py for the seal.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from fewstep.actors.sandbox.conversation import Conversation, Findings
from fewstep.actors.sandbox.languages import COMPILE_SECONDS, Toolchain
from fewstep.platform.records import Check, Outcome

_CPU_PER_WALL_SECOND = (
    2  # compilers of the JVM work beside the program; the wall clock is the limit that counts
)
# Only ever choose between kinds of failure, so what a program prints may be looked at.
_KINDS: tuple[tuple[Outcome, re.Pattern[str]], ...] = (
    (
        "memory",
        re.compile(
            r"OutOfMemoryError|bad_alloc|heap out of memory|Out of memory|Allowed memory size|NoMemoryError"
            r"|failed to allocate memory|MemoryError|Cannot allocate memory"
        ),
    ),
    ("syntax_error", re.compile(r"SyntaxError|IndentationError|syntax error|Parse error")),
    (
        "wrong_answer",
        re.compile(
            r"did not pass|failed to pass|Error at (?:test case|\d+)|AssertionError|^FAILED \(", re.MULTILINE
        ),
    ),
)
_SIGKILL = 9


@dataclass(frozen=True)
class CommandCheck:
    """One program on its way through a toolchain.

    Attributes:
        timeout_s: wall seconds of the tests (source) or of one run (stdin), compilation aside.
        memory_bytes: what the program may have beside what its runtime reserves.
        output_bytes: printed bytes that are read.
    """

    toolchain: Toolchain
    program: str
    check: Check
    timeout_s: float
    memory_bytes: int
    output_bytes: int

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds any one process may use."""
        wall = max(COMPILE_SECONDS, self.timeout_s) if self.toolchain.language.compile else self.timeout_s
        return _CPU_PER_WALL_SECOND * wall

    def run(self, conversation: Conversation, found: Findings) -> None:
        """Runs the check and notes what it shows.

        Raises:
            TimeoutError, ProgramLost: see Conversation.
        """
        (self._run_source if self.check.kind == "source" else self._run_stdin)(conversation, found)

    def _run_source(self, conversation: Conversation, found: Findings) -> None:
        nonce = secrets.token_hex(16)
        self._start(conversation, self._files(nonce))
        *compilers, tests = self.toolchain.commands(self.memory_bytes)
        for command in compilers:
            reply = _execute(conversation, command, "", COMPILE_SECONDS)
            if reply["status"] != 0:
                outcome = _kind_of(reply, "syntax_error")
                found.note("syntax_error" if outcome == "wrong_answer" else outcome, _last_line(reply))
                return
        reply = _execute(conversation, tests, "", self.timeout_s)
        passed = reply["status"] == 0 and nonce in reply["output"]
        found.tests.append(passed)
        if not passed and reply["status"] == 0:
            found.note("runtime_error", "the program ended before its tests did")
        elif not passed:
            found.note(_kind_of(reply, "runtime_error"), _last_line(reply))

    def _run_stdin(self, conversation: Conversation, found: Findings) -> None:
        self._start(conversation, self.toolchain.language.lay_out(self.program, "", ""))
        (command,) = self.toolchain.commands(self.memory_bytes)
        for (text,), expected in zip(self.check.inputs, self.check.expected, strict=True):
            reply = _execute(conversation, command, text, self.timeout_s)
            whole = reply["printed_bytes"] <= self.output_bytes
            right = reply["status"] == 0 and whole and same_lines(expected, reply["output"])
            found.tests.append(right)
            if right:
                continue
            if reply["status"] != 0:
                found.note(_kind_of(reply, "runtime_error"), _last_line(reply))
            else:
                found.note("wrong_answer", f"input {len(found.tests) - 1} printed something else")

    def _files(self, nonce: str) -> dict[str, str]:
        lay_out, check = self.toolchain.language.lay_out, self.check
        if not check.module:
            return lay_out(self.program, check.test_code, nonce)
        return {**lay_out("", check.test_code, nonce), f"{check.module}.py": self.program}

    def _start(self, conversation: Conversation, files: dict[str, str]) -> None:
        order = {
            "role": "commands",
            "files": files,
            "output_bytes": self.output_bytes,
            "environment": self.toolchain.environment,
        }
        conversation.ask(order, time.monotonic() + COMPILE_SECONDS)


def same_lines(expected: str, printed: str) -> bool:
    """Whether two texts have the same lines, blanks at their ends and empty lines at the end aside.

    Numbers that differ in spelling only (`1.50` and `1.5`) are the same where a line has as many words.
    """
    lines, others = expected.strip().split("\n"), printed.strip().split("\n")
    return len(lines) == len(others) and all(map(_same_line, lines, others))


def _same_line(expected: str, printed: str) -> bool:
    if expected.strip() == printed.strip():
        return True
    words, others = expected.split(), printed.split()
    return len(words) == len(others) > 0 and all(map(_same_word, words, others))


def _same_word(expected: str, printed: str) -> bool:
    if expected == printed:
        return True
    try:
        # Not float: 2**60 and 2**60 + 1 are one float.
        return Decimal(expected) == Decimal(printed)
    except InvalidOperation:
        return False


def _execute(conversation: Conversation, argv: list[str], stdin: str, seconds: float) -> dict[str, Any]:
    return conversation.ask({"argv": argv, "stdin": stdin}, time.monotonic() + seconds)


def _kind_of(reply: dict[str, Any], otherwise: Outcome) -> Outcome:
    # A wall-clock end is the caller's; a signal 9 that nobody here sent is the kernel's memory killer.
    if reply["status"] == -_SIGKILL:
        return "memory"
    return next((outcome for outcome, pattern in _KINDS if pattern.search(reply["errors"])), otherwise)


def _last_line(reply: dict[str, Any]) -> str:
    lines = [line.strip() for line in reply["errors"].splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"[Ee]rror|[Ee]xception|did not pass|panic", line)]
    ended = (
        f"exit status {reply['status']}" if reply["status"] >= 0 else f"killed by signal {-reply['status']}"
    )
    return f"{(telling or lines or [''])[0]} ({ended})".strip()
