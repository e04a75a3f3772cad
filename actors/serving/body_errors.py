"""What is wrong with a request body, as one line under the name the client used."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from fewstep.platform.errors import RequestError

_SHOWN = 80


class UnsupportedField(RequestError):
    """A field this server knows of but cannot honour."""


class UnknownField(RequestError):
    """A field that is nobody's."""


def field_error(error: ValidationError) -> RequestError:
    """The most specific problem of the first wrong field."""
    first = error.errors()[0]
    # A field of several shapes reports one problem a shape; the deepest belongs to the shape that was meant.
    problems = [problem for problem in error.errors() if problem["loc"][0] == first["loc"][0]]
    problem = max(problems, key=lambda found: len(found["loc"]))
    field = _dotted(problem["loc"])
    if problem["type"] == "missing":
        return RequestError(field, "nothing", "a value (the field is required)", f"send {field}")
    if problem["type"] == "extra_forbidden":
        return UnknownField(field, shorten(problem["input"]), "the documented fields", "remove it")
    allowed = [
        other["msg"].removeprefix("Input should be ") for other in problems if _dotted(other["loc"]) == field
    ]
    return RequestError(
        field, shorten(problem["input"]), " or ".join(dict.fromkeys(allowed)), f"change {field}"
    )


def _dotted(loc: tuple[int | str, ...]) -> str:
    """A location as the client spells it: pydantic adds names of shapes ("list[TextPart]"), which nobody sent."""
    parts = [str(part) for part in loc if isinstance(part, int) or part.isidentifier()]
    return ".".join(part for part in parts if part not in ("str", "int"))


def shorten(value: Any) -> str:
    """A JSON value as the client wrote it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
