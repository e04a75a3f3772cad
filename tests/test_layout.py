"""The shape of the tree: packages, names, sizes, and which checkout is being tested."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("platform", "kernels", "actors", "pipelines", "cluster")
MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))

MAX_MODULE_LINES, MAX_KERNEL_LINES, MAX_FUNCTION_LINES = 400, 600, 60
# "path:qualified.name": "reason"
LONG_FUNCTIONS: dict[str, str] = {}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(
    tree: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not isinstance(node, ast.ClassDef):
                yield f"{prefix}{node.name}", node
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def tracked_files() -> list[Path]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout, so there are no tracked files to read")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_tree_was_found() -> None:
    # Every other test here loops over it; an empty loop would pass.
    assert {relative(path).split("/")[0] for path in MODULES} == set(FLOORS)


def test_root_floors_have_no_init() -> None:
    assert [floor for floor in (*FLOORS, "cluster/cli", ".") if (ROOT / floor / "__init__.py").exists()] == []


def test_the_standard_library_platform_is_importable_from_the_root() -> None:
    program = "import platform, sys; print(platform.python_version(), platform.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    version, file = done.stdout.split()
    assert version == ".".join(map(str, sys.version_info[:3]))
    assert not Path(file).is_relative_to(ROOT / "platform")


def test_package_list_matches_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    nested = {path.parent for floor in FLOORS for path in (ROOT / floor).rglob("__init__.py")}
    with_modules = {path.parent for path in MODULES} - {ROOT / "cluster" / "cli"}
    roots = {ROOT / floor for floor in FLOORS}
    assert with_modules - roots <= nested, "a folder with modules lacks its __init__.py"
    expected = {"fewstep"} | {"fewstep." + relative(folder).replace("/", ".") for folder in nested | roots}
    assert sorted(listed) == sorted(expected)


@pytest.mark.parametrize("floor", FLOORS)
def test_the_imported_package_is_this_checkout(floor: str) -> None:
    package = importlib.import_module(f"fewstep.{floor}")
    folders = [Path(entry).resolve() for entry in package.__path__]
    assert ROOT / floor in folders, "the environment has another checkout installed; run `make install` here"


def test_module_sizes() -> None:
    too_long = {}
    for path in MODULES:
        limit = MAX_KERNEL_LINES if path.is_relative_to(ROOT / "kernels") else MAX_MODULE_LINES
        if (lines := len(path.read_text().splitlines())) > limit:
            too_long[relative(path)] = lines
    assert too_long == {}


def test_function_sizes() -> None:
    too_long = {
        f"{relative(path)}:{name}": length
        for path in MODULES
        for name, node in functions(ast.parse(path.read_text()))
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert too_long.keys() == LONG_FUNCTIONS.keys(), too_long


def test_no_module_without_a_noun() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [relative(path) for path in MODULES if {*path.with_suffix("").parts} & vague] == []


def test_no_module_is_named_like_the_standard_library() -> None:
    names = {(path.parent if path.stem == "__init__" else path.with_suffix("")) for path in MODULES}
    allowed = {ROOT / "platform", ROOT / "cluster" / "cli" / "__main__"}
    assert [relative(name) for name in sorted(names - allowed) if name.name in sys.stdlib_module_names] == []


def test_no_tracked_file_knows_this_machine() -> None:
    # A path starts where no path character precedes it.
    absolute = re.compile(r"(?<![\w.~/$}-])/(?:work|root)/\w")
    offenders = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # binary: weights and figures
        offenders += [f"{relative(path)}: {hit.group()}" for hit in absolute.finditer(text)]
    assert offenders == []


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"]]
    lock = (ROOT / "requirements" / "cpu.txt").read_text()
    pinned = {line.partition("==")[0] for line in lock.splitlines() if re.match(r"[\w.-]+==", line)}
    names = {re.split(r"[^\w.-]", item)[0].lower().replace("_", "-") for item in wanted}
    assert names - pinned == set()
    unpinned = [line for line in lock.splitlines() if line and line[0] not in " #" and "==" not in line]
    assert unpinned == []
    # triton alone is wanted: its interpreter and its ahead-of-time compiler need no GPU.
    assert not re.search(r"^(nvidia|cuda)", lock, re.MULTILINE), "the CPU lock carries GPU packages"
