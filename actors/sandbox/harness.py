"""What runs in the forked children: a program under test, the check that talks to one, or the supervisor of commands.

All speak wire frames on their own socket with the process that ordered the verdict. A program's replies are data to
be judged elsewhere, so nothing here needs protection from the program: it can only lie about its own answers. The
supervisor runs no untrusted code itself; what it starts inherits its confinement, but not its socket.
"""

from __future__ import annotations

import builtins
import os
import random
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

from fewstep.actors.sandbox import values, wire

OUT_OF_MEMORY_EXIT = 77
_NO_LIMIT = 1 << 31
_DETAIL_CHARS = 200
_ERROR_BYTES = 4000
_OUTPUT, _ERRORS = ".output", ".errors"
# All a command finds in its environment; its folder stands in for the home and the temporary one.
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def describe(error: BaseException) -> str:
    """`Type: message`, short; survives errors that fail to print themselves."""
    try:
        return f"{type(error).__name__}: {error}"[:_DETAIL_CHARS]
    except BaseException:  # noqa: BLE001 -- the message is made by untrusted code
        return type(error).__name__[:_DETAIL_CHARS]


def main(connection: socket.socket) -> None:
    """Reports ready, takes one order and carries it out. Ends the process."""
    try:
        wire.send(connection, {"ready": True})
        order = wire.receive(connection, _NO_LIMIT)
        random.seed(0)  # the zygote's generator state differs from start to start
        {"program": _run_program, "checker": _run_checker, "commands": _run_commands}[order["role"]](
            connection, order
        )
    except MemoryError:
        os._exit(OUT_OF_MEMORY_EXIT)
    os._exit(0)


def _run_program(connection: socket.socket, order: dict[str, Any]) -> None:
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and typing look a class's module up by name
    try:
        code = compile(order["program"], "program.py", "exec", dont_inherit=True)
    except MemoryError as error:
        wire.send(connection, {"failed": "memory", "detail": describe(error)})
        return
    except (SyntaxError, ValueError, RecursionError) as error:
        wire.send(connection, {"failed": "syntax_error", "detail": describe(error)})
        return
    reply = _guarded(lambda: exec(code, module.__dict__))  # noqa: S102 -- the purpose of this process
    if "value" not in reply:
        outcome = "memory" if reply["kind"] == "MemoryError" else "runtime_error"
        wire.send(connection, {"failed": outcome, "detail": reply["raised"]})
        return
    wire.send(connection, {"loaded": True})
    if order["calls"] is None:
        _answer_calls(connection, module)
    for arguments in order["calls"] or ():
        wire.send(connection, _call(module, order["entry_point"], arguments, {}))


def _answer_calls(connection: socket.socket, module: types.ModuleType) -> None:
    while True:
        try:
            message = wire.receive(connection, _NO_LIMIT)
        except EOFError:
            return
        wire.send(connection, _call(module, message["name"], message["arguments"], message["keywords"]))


def _call(
    module: types.ModuleType, name: str, arguments: list[Any], keywords: dict[str, Any]
) -> dict[str, Any]:
    """Calls a function of the program with fresh arguments; the reply is the encoded value or the error."""

    def run() -> Any:
        if not hasattr(module, name):
            raise NameError(f"name {name!r} is not defined")
        function = getattr(module, name)
        given = {key: values.decode(tree) for key, tree in keywords.items()}
        return values.encode(function(*[values.decode(tree) for tree in arguments], **given))

    return _guarded(run)


def _guarded(run: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": run()}
    except BaseException as error:  # noqa: BLE001 -- SystemExit and KeyboardInterrupt count as errors here
        return {"raised": describe(error), "kind": type(error).__name__}


class ProgramError(Exception):
    """The program raised something that has no name in the checker's interpreter."""


class _Program:
    """The program as its checker sees it: functions by name, plain data in and out."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.last_error: BaseException | None = None

    def function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            message = {
                "name": name,
                "arguments": [values.encode(argument) for argument in arguments],
                "keywords": {key: values.encode(argument) for key, argument in keywords.items()},
            }
            wire.send(self._connection, {"call": message})
            reply = wire.receive(self._connection, _NO_LIMIT)
            if "value" in reply:
                return values.decode(reply["value"])
            self.last_error = _named_error(reply)
            raise self.last_error

        return call


def _named_error(reply: dict[str, Any]) -> Exception:
    """The same-named built-in exception, so that a check may expect one."""
    kind = getattr(builtins, str(reply.get("kind")), None)
    detail = str(reply.get("raised"))
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(detail)
        except TypeError:  # UnicodeError and its like take more than a message
            return ProgramError(detail)
    return ProgramError(detail)


def names_used(code: types.CodeType) -> set[str]:
    """Every global or attribute name that a code object or one nested in it mentions."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_used(constant)
    return names


def _run_checker(connection: socket.socket, order: dict[str, Any]) -> None:
    program = _Program(connection)
    module = types.ModuleType("check")
    sys.modules["check"] = module
    try:
        code = compile(order["test_code"], "check.py", "exec", dont_inherit=True)
        # Tests may use the program's other functions (HumanEval/32 calls poly): what nobody else defines is theirs.
        for name in names_used(code):
            if not (hasattr(builtins, name) or name.startswith("__")):
                setattr(module, name, program.function(name))
        exec(code, module.__dict__)  # noqa: S102 -- the task's own check
        checks = [module.__dict__[name] for name in order["parts"]]
    except BaseException as error:  # noqa: BLE001 -- whatever it is, the check is at fault
        wire.send(connection, {"broken": describe(error)})
        return
    for check in checks:
        try:
            check(program.function(order["entry_point"]))
        except BaseException as error:  # noqa: BLE001 -- only a normal return is a pass
            outcome = "runtime_error" if error is program.last_error else "wrong_answer"
            wire.send(connection, {"failed": outcome, "detail": describe(error)})
        else:
            wire.send(connection, {"passed": order["nonce"]})


def _run_commands(connection: socket.socket, order: dict[str, Any]) -> None:
    """Writes the files, then executes whatever is asked for, one command at a time."""
    for name, text in order["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)
    wire.send(connection, {"loaded": True})
    while True:
        try:
            command = wire.receive(connection, _NO_LIMIT)
        except EOFError:
            return
        wire.send(connection, _execute(command, order["output_bytes"], order["environment"]))


def _execute(command: dict[str, Any], output_bytes: int, more: dict[str, str]) -> dict[str, Any]:
    """Runs one command to its end. The reply has its exit status (minus a signal), what it printed (the last
    `output_bytes` of it) and the end of its error stream."""
    folder = os.getcwd()
    environment = {**_ENVIRONMENT, "HOME": folder, "TMPDIR": folder, **more}
    try:
        # Into files, not pipes: the size limit bounds them, and no reader is needed while the program runs.
        with open(_OUTPUT, "w+b") as output, open(_ERRORS, "w+b") as errors:
            given = command["stdin"].encode("utf-8", "surrogatepass")
            process = subprocess.Popen(
                command["argv"],
                stdin=subprocess.PIPE if given else subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
            )
            with process:
                if given:
                    _feed(process, given)
                status = process.wait()
            return {
                "status": status,
                "output": _last(output, output_bytes),
                "errors": _last(errors, _ERROR_BYTES),
                "printed_bytes": output.seek(0, os.SEEK_END),
            }
    except OSError as error:
        return {"status": 127, "output": "", "errors": describe(error), "printed_bytes": 0}


def _feed(process: subprocess.Popen[bytes], text: bytes) -> None:
    if process.stdin is not None:
        try:
            process.stdin.write(text)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it does not read all it is given, which is its own affair


def _last(file: Any, count: int) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - count))
    return str(file.read(count).decode("utf-8", "replace"))
