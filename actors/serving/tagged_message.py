"""The tagged user messages of the apply and edit endpoints (Mercury's shapes), read strictly: what is wrong is named."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fewstep.platform.errors import RequestError

FIELD = "messages.0.content"

_SECTIONS = ("recently_viewed_code_snippets", "current_file_content", "edit_diff_history")
_SNIPPET = "recently_viewed_code_snippet"
_REGION = "code_to_edit"
CURSOR = "<|cursor|>"


@dataclass(frozen=True)
class ApplyRequest:
    """A file and a shortened description of what it should become."""

    original_code: str
    update_snippet: str


@dataclass(frozen=True)
class EditRequest:
    """A file with the region to rewrite, and what its author did before.

    Attributes:
        snippets: recently viewed code, `path` and text.
        before, region, after: the file's three parts, as they join; `region` without the cursor's mark.
        shown_region: the region with the mark, if it has one.
        diffs: recent edits as unified diffs, newest last.
    """

    path: str
    snippets: tuple[tuple[str, str], ...]
    before: str
    region: str
    shown_region: str
    after: str
    diffs: str


def parse_apply(text: str) -> ApplyRequest:
    """`<|original_code|>…<|/original_code|>` and `<|update_snippet|>…<|/update_snippet|>`, in this order, once each.

    Raises:
        RequestError: a tag is missing, repeated or out of order, or there is text between the sections.
    """
    original, update = _sections(text, ("original_code", "update_snippet"))
    if not update.strip():
        raise RequestError(FIELD, "an empty <|update_snippet|>", "the new code", "say what should change")
    return ApplyRequest(_lines(original), _lines(update))


def parse_edit(text: str) -> EditRequest:
    """Sections `recently_viewed_code_snippets`, `current_file_content` (with `code_to_edit` in it) and
    `edit_diff_history`, in this order, once each; the first and the last may be empty.

    Raises:
        RequestError: a tag is missing, repeated or out of order, a path is missing, or there is text between sections.
    """
    seen, file, diffs = _sections(text, _SECTIONS)
    path, code = _path(_lines(file), "current_file_path")
    before, region, after = _split(code, _REGION)
    if region.count(CURSOR) > 1 or CURSOR in before or CURSOR in after:
        raise RequestError(FIELD, f"{CURSOR} elsewhere", f"at most one, in <|{_REGION}|>", "move it there")
    # A tag on a line of its own takes that line's break with it.
    region = region.removeprefix("\n")
    if region.endswith("\n"):
        region, after = region[:-1], "\n" + after.removeprefix("\n")
    snippets = tuple(_path(_lines(part), "code_snippet_file_path") for part in _snippets(seen))
    return EditRequest(path, snippets, before, region.replace(CURSOR, ""), region, after, _lines(diffs))


def _sections(text: str, names: tuple[str, ...]) -> list[str]:
    """The content of each section; nothing but space may stand between them."""
    found, rest = [], text
    for name in names:
        before, content, rest = _split(rest, name)
        if before.strip():
            raise RequestError(
                FIELD,
                f"text before <|{name}|>",
                "the tagged sections alone",
                "remove it or put it in a section",
            )
        found.append(content)
    if rest.strip():
        raise RequestError(FIELD, f"text behind <|/{names[-1]}|>", "nothing there", "remove it")
    return found


def _split(text: str, name: str) -> tuple[str, str, str]:
    """What stands before, in and behind the only section of a name."""
    opening, closing = f"<|{name}|>", f"<|/{name}|>"
    for tag in (opening, closing):
        if text.count(tag) != 1:
            got = f"no {tag}" if tag not in text else f"{text.count(tag)} times {tag}"
            raise RequestError(
                FIELD, got, f"one {opening}…{closing}, in the documented order", "correct the tags"
            )
    before, _, rest = text.partition(opening)
    if closing not in rest:
        raise RequestError(FIELD, f"{closing} before {opening}", f"{opening}…{closing}", "swap them")
    content, _, after = rest.partition(closing)
    return before, content, after


def _snippets(text: str) -> list[str]:
    opening, closing = f"<|{_SNIPPET}|>", f"<|/{_SNIPPET}|>"
    parts = re.findall(f"{re.escape(opening)}(.*?){re.escape(closing)}", text, re.DOTALL)
    left = re.sub(f"{re.escape(opening)}.*?{re.escape(closing)}", "", text, flags=re.DOTALL)
    if left.strip():
        raise RequestError(
            FIELD, f"text outside {opening}…{closing}", f"{opening}…{closing} pairs alone", "correct the tags"
        )
    return parts


def _path(text: str, key: str) -> tuple[str, str]:
    """The path on the first line and the code behind it."""
    first, _, code = text.partition("\n")
    if not first.startswith(f"{key}:"):
        raise RequestError(FIELD, f"no `{key}:` line", f"`{key}: PATH` as the first line", "add it")
    return first.removeprefix(f"{key}:").strip(), code


def _lines(content: str) -> str:
    """A section's content without the line breaks that belong to its tags."""
    return content.removeprefix("\n").removesuffix("\n")
