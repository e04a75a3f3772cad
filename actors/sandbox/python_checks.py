"""Checks of Python functions: called with arguments (`call`), or by a test script in a process of its own (`script`).

The caller's side; harness.py is the other one.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from fewstep.actors.sandbox import values, wire
from fewstep.actors.sandbox.conversation import NOT_A_FRAME, Conversation, Findings
from fewstep.platform.records import Check, Outcome

_KNOWN_FAILURES: dict[str, Outcome] = {
    "syntax_error": "syntax_error",
    "memory": "memory",
    "wrong_answer": "wrong_answer",
}
_KNOWN_ERRORS: dict[str, Outcome] = {"MemoryError": "memory", "NotPlainData": "wrong_answer"}


def answers(
    conversation: Conversation, program: str, check: Check, deadline: float, found: Findings
) -> Iterator[dict[str, Any]]:
    """Loads a program and calls its function with each of the check's inputs: the replies, in order. Of a program
    that does not load there are none, and `found` says why."""
    calls = [[values.encode(argument) for argument in arguments] for arguments in check.inputs]
    failure = _load(conversation, program, check, calls, deadline)
    if failure is not None:
        _note_failure(found, failure)
        return
    for _ in calls:
        yield conversation.ask(None, deadline)


def run_calls(
    conversation: Conversation, program: str, check: Check, deadline: float, found: Findings
) -> None:
    """Compares what each call returns with what it should."""
    expected = [values.encode(value) for value in check.expected]
    for index, reply in enumerate(answers(conversation, program, check, deadline, found)):
        right = "value" in reply and values.same(expected[index], reply["value"])
        found.tests.append(right)
        if right:
            continue
        if "value" in reply:
            found.note("wrong_answer", f"call {index} returned something else")
        else:
            outcome = _KNOWN_ERRORS.get(str(reply.get("kind")), "runtime_error")
            found.note(outcome, str(reply.get("raised", NOT_A_FRAME)))


def load_for_script(
    conversation: Conversation, program: str, check: Check, deadline: float, found: Findings
) -> bool:
    """Loads a program that a script will call. False where it does not load; `found` says why."""
    failure = _load(conversation, program, check, None, deadline)
    if failure is not None:
        _note_failure(found, failure)
    return failure is None


def run_script(
    conversation: Conversation, checker: Conversation, check: Check, deadline: float, found: Findings
) -> None:
    """Carries calls and answers between a loaded program and the check's own child, until all parts are judged.

    Raises:
        ProgramLost, TimeoutError: of the program; a checker that ends early is a finding.
    """
    nonce = secrets.token_hex(16)
    message: Any = {
        "role": "checker",
        "test_code": check.test_code,
        "entry_point": check.entry_point,
        "parts": check.parts,
        "nonce": nonce,
    }
    while len(found.tests) < len(check.parts):
        try:
            if message is not None:
                wire.send(checker.connection, message, deadline)
            answer = wire.receive(checker.connection, checker.limit_bytes, deadline)
        except (EOFError, ConnectionError) as error:
            found.note("sandbox_error", f"the check's process ended: {error}")
            return
        message = None
        if "call" in answer:
            message = conversation.ask(answer["call"], deadline)
        elif answer.get("passed") == nonce:
            found.tests.append(True)
        elif "broken" in answer:
            found.note("sandbox_error", f"the check itself fails: {answer['broken']}")
            return
        else:
            found.tests.append(False)
            _note_failure(found, answer)


def _load(
    conversation: Conversation, program: str, check: Check, calls: list[Any] | None, deadline: float
) -> dict[str, Any] | None:
    """Hands the program over. Returns None once it is loaded, or the reply that says why it is not."""
    order = {"role": "program", "program": program, "entry_point": check.entry_point, "calls": calls}
    reply = conversation.ask(order, deadline)
    return None if reply.get("loaded") is True else reply


def _note_failure(found: Findings, reply: dict[str, Any]) -> None:
    outcome = _KNOWN_FAILURES.get(str(reply.get("failed")), "runtime_error")
    found.note(outcome, str(reply.get("detail", NOT_A_FRAME)))
