"""What Ray says of an actor's end, in one line a user can read."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

_PATIENCE_S = 5.0
_LONGEST = 700  # characters


def cause_of_death(error: BaseException) -> str:
    """One line of a RayActorError: how the process ended, or the error in its start; a long one without its middle."""
    text = " ".join(str(error).split()) or type(error).__name__
    detail = re.search(r"Worker exit detail: (.*?)\.? (?:Some common causes|$)", f"{text} ")
    if detail is not None:
        pid = re.search(r"\bpid: (\d+)", text)
        named = f" (pid {pid[1]})" if pid is not None else ""
        return f"its process{named} was killed or crashed ({detail[1].strip()})"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def first_death(calls: Mapping[str, Any]) -> tuple[str, str] | None:
    """Who of several actors is dead, and why; None if all answer.

    When one of a group dies, the others fail as well, on a connection that is gone: theirs is not the cause to show.

    Args:
        calls: by the actor's name, the pending result of a call that takes no time.
    """
    ray: Any = importlib.import_module("ray")  # late: only a job that has a session imports it
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=_PATIENCE_S)
    for name, error in failures({name: call for name, call in calls.items() if call in ready}):
        if isinstance(error, ray.exceptions.RayActorError):
            return name, cause_of_death(error)
    return None


def failures(ready: Mapping[str, Any]) -> list[tuple[str, Exception]]:
    """Of calls that have ended, by name, those that failed: first those whose process is gone, which others' may follow from."""
    ray: Any = importlib.import_module("ray")
    found = []
    for name, reference in ready.items():
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            found.append((name, error))
    return sorted(found, key=lambda failure: not isinstance(failure[1], ray.exceptions.RayActorError))
