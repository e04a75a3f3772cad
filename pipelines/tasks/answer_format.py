"""From what a model wrote to the text that is judged: where a completion stops, and what of it is the answer.

Stop rules end a generation early; reading makes sure that what comes behind the answer is not judged with it. A
canonical solution reads as itself (tested for every benchmark file), so the reading takes nothing that is needed.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from fewstep.platform.records import Task

# What starts after the function that was asked for (Chen et al. 2021, section 2.1, and code fences).
PYTHON_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
FENCE = "\n```"
_FENCE_LINE = re.compile(r"^[ \t]*```.*$", re.MULTILINE)
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
# The line after which a function of these languages is complete; the rule takes it away, reading restores it.
_COMMENT = {"perl": "#", "ruby": "#"}
_CLOSING = {"java": "\n    }\n", "csharp": "\n        }\n", "scala": "\n    }\n", "ruby": "\nend"}


@dataclass(frozen=True)
class AnswerFormat:
    """How a benchmark's completions are ended and read.

    Attributes:
        stop: strings that end the completion of a task.
        read: completion to the answer, which `Task.program` puts into its place.
        name: for the report.
    """

    stop: Callable[[Task], tuple[str, ...]]
    read: Callable[[Task, str], str]
    name: str


def _no_stop(task: Task) -> tuple[str, ...]:
    return ()


def as_it_is(task: Task, text: str) -> str:
    """The completion itself."""
    return text


def python_continuation(task: Task, text: str) -> str:
    """A completion of Python code, without the unfinished or foreign statements behind it.

    It is cut at the start of a top-level line, never inside an indented block, at the last place where header and
    answer are a program; then before the first top-level statement that defines nothing.
    """
    before = task.program("").removesuffix(task.suffix)
    for end in _cuts(text):
        try:
            tree = parse_quietly(before + text[:end])
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return text[:end][: _end_of_definitions(tree, before, text[:end])]
    return text


def parse_quietly(source: str) -> ast.Module:
    """ast.parse of code that is not ours: its odd escapes are no warning of ours. Raises what ast.parse raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _cuts(text: str) -> list[int]:
    """Where a top-level line begins, last first, the whole text before all."""
    starts = [match.start() + 1 for match in re.finditer(r"\n(?=[^\s)\]}])", text)]
    return [len(text), *reversed(starts)]


def _end_of_definitions(tree: ast.Module, before: str, text: str) -> int:
    defines = (
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Import,
        ast.ImportFrom,
        ast.Assign,
        ast.AnnAssign,
    )
    first_line = before.count("\n") + 1
    for statement in tree.body:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if statement.lineno > first_line and not (isinstance(statement, defines) or is_text):
            lines = text.split("\n")[: statement.lineno - first_line]
            return len("\n".join(lines)) + 1
    return len(text)


def code_block(task: Task, text: str) -> str:
    """The code of a chat answer: the first fenced block that mentions the entry point, else the first; without any
    fence, or behind one that the prompt opened, the text up to the fence that closes it."""
    fences = [fence.strip() for fence in _FENCE_LINE.findall(text)]
    opened = task.prompt.endswith("```python\n") and not text.startswith("```")
    if opened or fences in ([], ["```"]):
        return text.split(FENCE)[0] + "\n"
    blocks = [match.group(1) for match in _FENCED.finditer(text)]
    named = [block for block in blocks if re.search(rf"\b{re.escape(task.check.entry_point)}\b", block)]
    return (named or blocks)[0]


def braces(task: Task, text: str) -> str:
    """A completion in a language with braces, up to the end of the function that the prompt opened; a closing line that
    the stop rule took is put back."""
    comment = _COMMENT.get(task.check.language, "//")
    needed = max(0, -_depth(task.check.test_code, comment)[0])
    opened = _depth(task.prompt, comment)[0]
    depth, ends = _depth(text, comment, opened, needed)
    if ends is not None:
        return text[:ends]
    return text + "\n" + "}\n" * max(0, min(depth, opened) - needed)


def ruby(task: Task, text: str) -> str:
    """A completion in Ruby, up to the line that ends the function, which is put back."""
    found = re.search(r"^end\b.*$", text, re.MULTILINE)
    return text[: found.end()] if found else text + "\nend\n"


def _depth(text: str, comment: str, start: int = 0, until: int | None = None) -> tuple[int, int | None]:
    """Open braces after `text`, strings and comments aside; and where they first came down to `until`, if they did.

    A text that ends inside a string was misread (a regular expression with a quotation mark in it): it is left as it is.
    """
    depth, quote, index = start, "", 0
    while index < len(text):
        character = text[index]
        if quote:
            if character == "\\" and quote != "\n":
                index += 1
            elif text.startswith(quote, index):
                index += len(quote) - 1
                quote = ""
        elif character in "\"'`":
            quote = character
        elif text.startswith(comment, index) and text[max(0, index - 1)] not in "$\\[":
            quote = "\n"
        elif text.startswith("/*", index):
            quote = "*/"
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if until is not None and character == "}" and depth <= until:
                return depth, index + 1
        index += 1
    return (depth, None) if quote in ("", "\n") else (depth, len(text))


def json_answer(task: Task, text: str) -> str:
    """The last JSON value of a text, as a program whose `answer()` returns it; no value, no program."""
    decoder = json.JSONDecoder()
    found: str | None = None
    index = 0
    while index < len(text):
        try:
            _, end = decoder.raw_decode(text, index)
        except ValueError:
            index += 1
            continue
        found, index = text[index:end], max(end, index + 1)
    if found is None:
        return text
    return f"import json\n\n\ndef answer():\n    return json.loads({found!r})\n"


def _closing(task: Task) -> tuple[str, ...]:
    return (_CLOSING.get(task.check.language, "\n}"),)


def _read_language(task: Task, text: str) -> str:
    if task.check.language == "python":
        return python_continuation(task, text)
    return ruby(task, text) if task.check.language == "ruby" else braces(task, text)


PLAIN = AnswerFormat(_no_stop, as_it_is, "as it is")
PYTHON = AnswerFormat(lambda task: PYTHON_STOPS, python_continuation, "Python continuation")
FENCED = AnswerFormat(lambda task: (FENCE,), code_block, "fenced code")
CHAT = AnswerFormat(_no_stop, code_block, "fenced code of a chat answer")
LANGUAGE = AnswerFormat(
    lambda task: PYTHON_STOPS if task.check.language == "python" else _closing(task),
    _read_language,
    "function body",
)
JSON = AnswerFormat(_no_stop, json_answer, "last JSON value")
