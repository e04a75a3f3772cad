"""Imports point down, and each outside library is known to the floors that may know it and to no other."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("platform", "kernels", "actors", "pipelines", "cluster")

# Who may import what; a prefix allows everything below it.
ALLOWED = {
    "torch": ("kernels", "actors", "pipelines", "cluster"),
    "triton": ("kernels",),
    "deepspeed": ("actors",),
    "ray": ("actors", "cluster"),
    "ray.serve": ("actors/serving", "cluster"),
    "fastapi": ("actors/serving", "cluster"),
    "starlette": ("actors/serving", "cluster"),
    "uvicorn": ("actors/serving", "cluster"),
    "openai": ("actors/serving", "cluster"),
    "httpx": ("actors/serving", "cluster"),
    "aiohttp": ("cluster",),
    "prometheus_client": ("actors/serving",),
    "opentelemetry": ("actors/serving",),
    "mlflow": ("platform", "pipelines/pyfunc", "cluster"),
    "matplotlib": ("pipelines", "cluster"),
}
# Ray-free islands on the actors' floor: the engine and the sandbox are used and tested without a cluster.
FORBIDDEN = {
    "ray": ("actors/engine", "actors/sandbox"),
    "torch": ("actors/sandbox",),
}
# The ground floor stands on these alone.
PLATFORM_LIBRARIES = {
    "numpy",
    "pydantic",
    "pydantic_core",
    "pyarrow",
    "yaml",
    "tokenizers",
    "pandas",
    "mlflow",
    "psutil",
    "pynvml",
}
# Imported inside functions only: they cost up to seconds, or may not be there, and most commands need none of them.
LAZY_ON_PLATFORM = {"mlflow", "pandas", "psutil", "pynvml"}


@dataclass(frozen=True)
class Import:
    path: Path
    line: int
    module: str
    top_level: bool

    @property
    def place(self) -> str:
        return self.path.relative_to(ROOT).with_suffix("").as_posix()

    @property
    def library(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.place}.py:{self.line} imports {self.module}"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_in(path: Path, node: ast.AST, top_level: bool = True) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(path, child.lineno, alias.name, top_level)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            for alias in child.names:
                yield Import(path, child.lineno, f"{module}.{alias.name}", top_level)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(child)
            yield from imports_in(path, child, top_level and not inside)


IMPORTS = [
    found
    for floor in FLOORS
    for path in sorted((ROOT / floor).rglob("*.py"))
    for found in imports_in(path, ast.parse(path.read_text()))
]


def within(place: str, prefixes: tuple[str, ...]) -> bool:
    return any(place == prefix or place.startswith(prefix + "/") for prefix in prefixes)


def names(found: Import, library: str) -> bool:
    return found.module == library or found.module.startswith(library + ".")


def test_the_imports_were_found() -> None:
    # Every other test here loops over them; an empty loop would pass.
    assert {found.place.split("/")[0] for found in IMPORTS} == set(FLOORS)
    assert any(names(found, "ray") for found in IMPORTS)
    assert any(names(found, "torch") for found in IMPORTS)


def test_no_relative_imports() -> None:
    # They would resolve differently for the installed name and for the folder.
    assert [str(found) for found in IMPORTS if found.module.startswith(".")] == []


def test_imports_point_down() -> None:
    upward = []
    for found in IMPORTS:
        if found.library == "fewstep":
            here, there = found.place.split("/")[0], found.module.split(".")[1]
            if there not in FLOORS or FLOORS.index(there) > FLOORS.index(here):
                upward.append(str(found))
    assert upward == []


@pytest.mark.parametrize("library", sorted(ALLOWED))
def test_a_library_stays_on_its_floors(library: str) -> None:
    users = [found for found in IMPORTS if names(found, library)]
    assert [str(found) for found in users if not within(found.place, ALLOWED[library])] == []
    assert [str(found) for found in users if within(found.place, FORBIDDEN.get(library, ()))] == []


def test_the_ground_floor_stands_on_few_libraries() -> None:
    known = PLATFORM_LIBRARIES | sys.stdlib_module_names | {"fewstep"}
    ground = [found for found in IMPORTS if within(found.place, ("platform",))]
    assert [str(found) for found in ground if found.library not in known] == []
    assert [str(found) for found in ground if found.library in LAZY_ON_PLATFORM and found.top_level] == []
