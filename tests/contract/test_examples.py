"""Everything we ship as something to type or to load does parse: configurations, and commands in documents."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fewstep.__main__ import main
from fewstep.cluster.commands import COMMANDS
from fewstep.platform.config import load_config, render_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for pattern in ("*.yaml", "*.yml") for path in (ROOT / "examples").rglob(pattern))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def command_of(path: Path) -> str:
    """examples/tiny/refine_long.yaml belongs to `fewstep refine`."""
    return re.split(r"[_.-]", path.name)[0]


def shell_lines(text: str) -> list[str]:
    """Lines of code blocks (fenced or indented), continuation lines joined, prompts and comments removed."""
    lines, fenced = [], False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ "))
    return lines


LINES = [(path, line) for path in DOCUMENTS for line in shell_lines(path.read_text())]
FEWSTEP_LINES = [
    pytest.param(line, id=f"{path.relative_to(ROOT)}: {line}")
    for path, line in LINES
    if re.match(r"(\.venv/bin/)?fewstep\s", line)
]
MAKE_TARGETS = sorted(
    {target for _, line in LINES if re.match(r"make [a-z]", line) for target in line.split()[1:2]}
)


def test_there_is_something_to_check() -> None:
    assert CONFIGS
    assert FEWSTEP_LINES
    assert {"demo", "test"} <= set(MAKE_TARGETS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_parses_with_its_commands_class(path: Path) -> None:
    assert command_of(path) in COMMANDS, "name the file after its command: refine.yaml, refine_long.yaml"
    config = load_config(COMMANDS[command_of(path)].config_class(), path, [])
    assert render_config(config)


@pytest.mark.parametrize("line", FEWSTEP_LINES)
def test_every_command_in_the_documents_parses(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    # Up to the first pipe or redirection; the rest is the reader's shell.
    words = shlex.split(re.split(r"\s(?:[|&<>]|&&)\s", line)[0].rstrip("& "))[1:]
    asks = "--help" in words or "--version" in words
    try:
        code = main(words if asks else [*words, "--dry-run"])
    except SystemExit as ended:  # argparse ends the process itself after --help
        code = int(ended.code or 0)
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("target", MAKE_TARGETS)
def test_every_make_target_in_the_documents_exists(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
