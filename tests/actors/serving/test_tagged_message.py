"""Tagged messages: what they hold, and how a malformed one is named."""

from __future__ import annotations

import pytest

from fewstep.actors.serving.tagged_message import parse_apply, parse_edit
from fewstep.platform.errors import RequestError

APPLY = "<|original_code|>\na\n\nb\n<|/original_code|>\n\n<|update_snippet|>\nc\n<|/update_snippet|>\n"
FILE = (
    "current_file_path: src/a.py\nbefore\n<|code_to_edit|>\n  one\n  t<|cursor|>wo\n<|/code_to_edit|>\nafter"
)
SNIPPET = "<|recently_viewed_code_snippet|>\ncode_snippet_file_path: b.py\nx\ny\n<|/recently_viewed_code_snippet|>\n"


def edit(file: str = FILE, snippets: str = SNIPPET, diffs: str = "-a\n+b") -> str:
    return (
        f"<|recently_viewed_code_snippets|>\n{snippets}<|/recently_viewed_code_snippets|>\n\n"
        f"<|current_file_content|>\n{file}\n<|/current_file_content|>\n\n"
        f"<|edit_diff_history|>\n{diffs}\n<|/edit_diff_history|>\n"
    )


def test_apply() -> None:
    parts = parse_apply(APPLY)
    assert (parts.original_code, parts.update_snippet) == ("a\n\nb", "c")


def test_edit() -> None:
    parts = parse_edit(edit(snippets=SNIPPET * 2))
    assert parts.path == "src/a.py"
    assert parts.snippets == (("b.py", "x\ny"),) * 2
    assert (parts.before, parts.region, parts.after) == ("before\n", "  one\n  two", "\nafter")
    assert parts.shown_region == "  one\n  t<|cursor|>wo"
    assert parts.diffs == "-a\n+b"


def test_a_region_inside_a_line_joins_as_it_stands() -> None:
    parts = parse_edit(edit("current_file_path: a\nf(<|code_to_edit|>x<|/code_to_edit|>)\n", "", ""))
    assert (parts.before, parts.region, parts.after) == ("f(", "x", ")\n")
    assert (parts.snippets, parts.diffs) == ((), "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"no <\|original_code\|>"),
        (APPLY.replace("<|/original_code|>", ""), r"no <\|/original_code\|>"),
        (APPLY * 2, r"2 times <\|original_code\|>"),
        ("<|/original_code|>\n<|original_code|>", r"<\|/original_code\|> before"),
        ("please " + APPLY, "text before"),
        (APPLY + "thanks", "text behind"),
        (APPLY.replace("\nc\n", "\n"), "an empty"),
        (
            "<|update_snippet|>c<|/update_snippet|><|original_code|>a<|/original_code|>",
            r"text before <\|original_code\|>",
        ),
    ],
)
def test_a_malformed_apply_message_is_named(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        parse_apply(text)
    assert caught.value.field == "messages.0.content"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (edit().replace("edit_diff_history", "diffs"), r"no <\|edit_diff_history\|>"),
        (edit(FILE.replace("<|/code_to_edit|>", "")), r"no <\|/code_to_edit\|>"),
        (edit(FILE.replace("current_file_path: ", "")), "no `current_file_path:`"),
        (edit(FILE.replace("before", "<|cursor|>")), "elsewhere"),
        (edit(FILE.replace("one", "<|cursor|>")), "elsewhere"),
        (edit(snippets="code"), "text outside"),
        (edit(snippets=SNIPPET.replace("code_snippet_file_path: ", "")), "no `code_snippet_file_path:`"),
        (edit(snippets=SNIPPET[:-5]), "text outside"),
    ],
)
def test_a_malformed_edit_message_is_named(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        parse_edit(text)
    assert caught.value.field == "messages.0.content"
