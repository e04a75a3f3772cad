"""Measured figures between the marks of a document."""

from __future__ import annotations

from pathlib import Path

from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.errors import ResourceError


def fill(page: Path, name: str, content: str) -> None:
    """Replaces what a document has between the marks of that name.

    Raises:
        ResourceError: no such document, or see `filled`.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ResourceError(str(page), error, "a document", "restore it") from error
    atomic_write_text(page, filled(text, name, content, str(page)))


def filled(text: str, name: str, content: str, page: str) -> str:
    """`text` with the lines between the marks of that name replaced; `page` is what an error calls it.

    Raises:
        ResourceError: the marks are not there, once each and in order.
    """
    begin, end = marks(name)
    before, first, rest = text.partition(begin + "\n")
    _, last, after = rest.partition(end)
    if not first or not last or begin in after or end in after:
        raise ResourceError(page, "no pair of marks", f"{begin} and {end}, once each", "restore them")
    return f"{before}{begin}\n{content}\n{end}{after}"


def marks(name: str) -> tuple[str, str]:
    """The lines before and after the figures of that name."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
