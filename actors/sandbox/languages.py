"""Programming languages the sandbox can run: where their tools are, how a program and its tests are laid out.

Tests of these languages assert inside the program's own process. What makes their verdict worth something is the
*seal*: the last thing after the last test prints a number nobody could guess, and the process must then end with
status 0. Leaving early, printing "passed" or catching an error seals nothing. The source has the number in two halves,
so that text which is shown instead of run (PHP after `?>`, a listing) seals nothing either. A program that searches its
own source for them is not stopped by this: docs/decisions/0011-other-languages.md.

A language is used where its tools are found *and* its probe, a program of two lines, passes in the sandbox.
"""

from __future__ import annotations

import glob
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.actors.sandbox.companions import DATA_COMPARE, LODASH, TRANSPILE
from fewstep.actors.sandbox.isolation import SYSTEM_PATHS

Files = dict[str, str]
Layout = Callable[[str, str, str], Files]

COMPILE_SECONDS = 60.0
"""A compiler's wall clock; far more than one file takes, so that a busy machine is no wrong answer."""
_RESERVED = (
    1 << 30
)  # measured: node, java and go reserve up to 768 MiB of addresses before the first statement
_PYTHON_TESTS = """
import sys as _sys, unittest as _unittest
_suite = _unittest.defaultTestLoader.loadTestsFromModule(_sys.modules["__main__"])
_result = _unittest.TextTestRunner(stream=_sys.stderr).run(_suite)
if not _result.wasSuccessful():
    _sys.exit(1)
"""


@dataclass(frozen=True)
class Language:
    """How programs of one language are made to run.

    Attributes:
        name: as benchmarks spell it.
        needs: executables that must be on the owner's PATH; `{name}` stands for their real place below.
        lay_out: program, tests and seal ("" = none) as files.
        run: the command that runs the tests.
        compile: commands before it.
        probe: a program and tests that it passes.
        reserved_bytes: address space the runtime takes before the program asks for any.
        shown: patterns of folders outside the tools' own that they read.
        libraries: folders, below the first tool's own, where the loader must look. Without /proc a program cannot
            find out where it lies, so what it would look up beside itself is named.
    """

    name: str
    needs: tuple[str, ...]
    lay_out: Layout
    run: tuple[str, ...]
    probe: tuple[str, str]
    compile: tuple[tuple[str, ...], ...] = ()
    reserved_bytes: int = 0
    shown: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()

    def find(self) -> Toolchain | None:
        """The tools on this host; None where one is missing."""
        places = {name: place for name in self.needs if (place := _place(name))}
        if len(places) < len(self.needs):
            return None
        folders = [str(Path(place).parent.parent) for place in places.values()]
        folders += [path for pattern in self.shown for path in sorted(glob.glob(pattern))]
        return Toolchain(self, places, tuple(dict.fromkeys(path for path in folders if not _is_system(path))))


@dataclass(frozen=True)
class Toolchain:
    """A language and the places of its tools on this host; `shown`: what of them is outside the system's folders."""

    language: Language
    places: dict[str, str]
    shown: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """What the commands need beyond the few variables that all get."""
        home = Path(self.places[self.language.needs[0]]).parent.parent
        paths = ":".join(str(home / folder) for folder in self.language.libraries)
        return {"LD_LIBRARY_PATH": paths} if paths else {}

    def commands(self, memory_bytes: int) -> list[list[str]]:
        """What to execute, in order; the last one runs the tests."""
        words = {**self.places, "mebibytes": str(memory_bytes >> 20)}
        return [
            [word.format_map(words) for word in command]
            for command in (*self.language.compile, self.language.run)
        ]


def _place(name: str) -> str | None:
    if name == "python":
        # Not resolved: the link inside a virtual environment is what makes its packages importable. But /tmp is the
        # program's own in the sandbox: of an environment in there only the interpreter behind it can be seen.
        hidden = Path(sys.executable).is_relative_to("/tmp")
        return str(Path(sys.executable).resolve()) if hidden else sys.executable
    found = shutil.which(name)
    return str(Path(found).resolve()) if found else None


def _is_system(path: str) -> bool:
    return any(path == system or path.startswith(system + "/") for system in SYSTEM_PATHS)


def halves(nonce: str) -> tuple[str, str]:
    """The seal as it stands in a source."""
    return nonce[: len(nonce) // 2], nonce[len(nonce) // 2 :]


def _joined(name: str, seal: str, extra: Files | None = None) -> Layout:
    """Everything in one file, the seal as its last statement; `%s` in it are the halves."""

    def lay_out(program: str, tests: str, nonce: str) -> Files:
        text = program + "\n" + tests + "\n" + (seal % halves(nonce) if nonce else "")
        return {name: text, **(extra or {})}

    return lay_out


def _python(program: str, tests: str, nonce: str) -> Files:
    first, second = halves(nonce)
    seal = f"{_PYTHON_TESTS}print('{first}' + '{second}')\n" if nonce else ""
    return {"main.py": program + "\n" + tests + "\n" + seal}


def _java(program: str, tests: str, nonce: str) -> Files:
    # halt: a thread that the program left running must not keep a passed test from ending.
    first, second = halves(nonce)
    sealed = (
        f'Main.main(arguments); System.out.println("{first}" + "{second}"); System.out.flush(); '
        "Runtime.getRuntime().halt(0);"
    )
    launcher = (
        f"class Sealed {{ public static void main(String[] arguments) throws Throwable {{ {sealed} }} }}\n"
    )
    return {"Main.java": program + "\n" + tests + "\n", "Sealed.java": launcher}


def _cpp(program: str, tests: str, nonce: str) -> Files:
    first, second = halves(nonce)
    # A function of any other name than main must return explicitly; the published tests do.
    sealed = (
        "#undef main\n#include <cstdio>\nint main(int count, char** words) {\n"
        "    int status = tested_main(count, words);\n"
        f'    if (status == 0) {{ std::fputs("{first}", stdout); std::puts("{second}"); }}\n'
        "    return status;\n}\n"
    )
    tests = re.sub(r"\bint\s+main\s*\(\s*(void)?\s*\)", "int main(int, char**)", tests)
    return {"main.cpp": f"{program}\n#define main tested_main\n{tests}\n{sealed}"}


def _go(program: str, tests: str, nonce: str) -> Files:
    first, second = halves(nonce)
    tested = re.sub(r"\bfunc\s+main\s*\(", "func testedMain(", program + "\n" + tests)
    body = f'\ttestedMain()\n\tos.Stdout.WriteString("{first}" + "{second}\\n")\n'
    launcher = f'package main\n\nimport "os"\n\nfunc main() {{\n{body}}}\n'
    return {"main.go": tested, "sealed.go": launcher}


_NODE_SEAL = 'require("fs").writeSync(1, "%s" + "%s\\n");\n'
_NODE = ("{node}", "--max-old-space-size={mebibytes}", "--stack-size=900")
_SMALL_JVM = (
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-XX:ReservedCodeCacheSize=32m",
    "-XX:CompressedClassSpaceSize=32m",
)
_JAVAC = ("{javac}", "-J-Xmx{mebibytes}m", *(f"-J{flag}" for flag in _SMALL_JVM))

LANGUAGES = {
    language.name: language
    for language in (
        Language(
            "python", ("python",), _python, ("{python}", "-s", "-E", "-B", "main.py"),
            ("def f(x):\n    return x + 1\n", "assert f(1) == 2\n"), reserved_bytes=_RESERVED,
        ),
        Language(
            "javascript", ("node",), _joined("main.js", _NODE_SEAL, {"lodash.js": LODASH}),
            (*_NODE, "--require", "./lodash.js", "main.js"),
            ("function f(x) { return [x]; }", 'if (!require("lodash").isEqual(f(1), [1])) throw "f";'),
            reserved_bytes=_RESERVED,
        ),
        Language(
            "typescript", ("node", "tsc"),
            _joined("main.ts", _NODE_SEAL, {"lodash.js": LODASH, "transpile.js": TRANSPILE}),
            (*_NODE, "--require", "./lodash.js", "main.js"),
            ("const f = (x: number): number => x;", 'import * as a from "assert"; a.deepEqual(f(1), 1);'),
            compile=((*_NODE, "transpile.js", "{tsc}", "main.ts", "main.js"),), reserved_bytes=_RESERVED,
        ),
        Language(
            "java", ("javac", "java"), _java,
            ("{java}", "-Xmx{mebibytes}m", "-Xshare:auto", *_SMALL_JVM, "-cp", ".", "Sealed"),
            ("class A { static int f(int x) { return x; } }",
             "class Main { public static void main(String[] a) { if (A.f(1) != 1) throw new RuntimeException(); } }"),
            compile=((*_JAVAC, "-proc:none", "-nowarn", "-encoding", "UTF-8", "Main.java", "Sealed.java"),),
            reserved_bytes=_RESERVED, shown=("/etc/java-*-openjdk",), libraries=("lib", "lib/server"),
        ),
        Language(
            "cpp", ("g++",), _cpp, ("./program",),
            ("#include <vector>\nint f(int x) { return x; }", "int main() { return f(0); }"),
            compile=(("{g++}", "-O0", "-std=c++17", "-w", "-o", "program", "main.cpp"),),
            reserved_bytes=_RESERVED,
        ),
        Language(
            "perl", ("perl",), _joined("main.pl", 'print "%s", "%s\\n";\n', {"Companion.pm": DATA_COMPARE}),
            ("{perl}", "-I.", "-MCompanion", "main.pl"),
            ("sub f { return [@_]; }", 'use Data::Compare;\ndie "f" unless Compare(f(1), [1]);'),
        ),
        Language(
            "ruby", ("ruby",), _joined("main.rb", '$stdout.puts "%s" + "%s"\n'),
            ("{ruby}", "main.rb"), ("def f(x)\n  x\nend", 'raise "f" if f(1) != 1'),
        ),
        Language(
            "php", ("php",), _joined("main.php", 'echo "%s", "%s\\n";\n'),
            ("{php}", "-n", "-d", "memory_limit={mebibytes}M", "-d", "display_errors=stderr", "main.php"),
            ("<?php\nfunction f($x) { return $x; }", 'if (f(1) != 1) { throw new Exception("f"); }'),
        ),
        Language(
            "go", ("go",), _go, ("./program",),
            ("package main\n\nfunc f(x int) int { return x }", 'func main() {\n\tif f(1) != 1 {\n\t\tpanic("f")\n\t}\n}'),
            compile=(("{go}", "build", "-o", "program", "main.go", "sealed.go"),), reserved_bytes=_RESERVED,
        ),
    )
}  # fmt: skip
"""Every language there is a way to run; benchmarks name others, which are then excluded by name."""


def find_toolchains() -> dict[str, Toolchain]:
    """The languages whose tools this host has, by name; whether they work inside is for a sandbox to say."""
    found = {name: language.find() for name, language in LANGUAGES.items()}
    return {name: toolchain for name, toolchain in found.items() if toolchain is not None}


def shown_folders(toolchains: Sequence[Toolchain]) -> list[str]:
    """Folders outside the system's own that these tools need to see."""
    return list(dict.fromkeys(path for toolchain in toolchains for path in toolchain.shown))
