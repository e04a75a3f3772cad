"""Programs of other languages in the sandbox: outcome classes, the seal, and the walls around them."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep.actors.sandbox.commands import same_lines
from fewstep.actors.sandbox.languages import LANGUAGES
from fewstep.actors.sandbox.sandbox import Limits, Sandbox
from fewstep.platform.records import Check

# (right, wrong, raises, unreadable, endless, leaves early) programs of f, and a test that asks for f(2) == 6.
PROGRAMS = {
    "python": (
        "def f(x):\n    return 3 * x", "def f(x):\n    return x", "def f(x):\n    return [][x]", "def f(x:",
        "def f(x):\n    while True: pass", "import os\ndef f(x):\n    os._exit(0)",
        "assert f(2) == 6",
    ),
    "javascript": (
        "function f(x) { return 3 * x }", "function f(x) { return x }", "function f(x) { return y.z }", "function f(x {",
        "function f(x) { for (;;) ; }", "function f(x) { process.exit(0) }",
        'const _ = require("lodash");\nif (!_.isEqual([f(2), 0], [6, -0])) { throw "test case 0 did not pass"; }',
    ),
    "typescript": (
        "const f = (x: number): number => 3 * x", "const f = (x: number): number => x",
        "const f = (x: any): number => x.y.z", "const f = (x: => 3", "const f = (x: number) => { for (;;) ; }",
        "declare const process: any; const f = (x: number) => { process.exit(0) }",
        'import * as assert from "assert";\nassert.deepEqual(f(2), 6, "test case 0 failed to pass");',
    ),
    "java": (
        "class A { static int f(int x) { return 3 * x; } }", "class A { static int f(int x) { return x; } }",
        "class A { static int f(int x) { return (new int[0])[x]; } }", "class A { static int f(int x { return x; } }",
        "class A { static int f(int x) { while (x > 0); return x; } }",
        "class A { static int f(int x) { System.exit(0); return x; } }",
        'class Main { public static void main(String[] a) throws Exception { if (A.f(2) != 6) throw new Exception("test case 0 did not pass"); } }',
    ),
    "cpp": (
        "#include <vector>\n#include <cstdlib>\n#include <stdexcept>\nusing namespace std;\nint f(int x) { return 3 * x; }",
        "#include <cstdlib>\n#include <stdexcept>\nusing namespace std;\nint f(int x) { return x; }",
        "#include <vector>\n#include <stdexcept>\nusing namespace std;\nint f(int x) { return vector<int>().at(x); }",
        "#include <stdexcept>\nusing namespace std;\nint f(int x { return x; }",
        "#include <stdexcept>\nusing namespace std;\nint f(int x) { volatile int y = x; while (y) ; return x; }",
        "#include <cstdlib>\n#include <stdexcept>\nusing namespace std;\nint f(int x) { exit(0); }",
        'int main() { if (f(2) != 6) throw runtime_error("test case 0 did not pass"); return 0; }',
    ),
    "perl": (
        "sub f { return 3 * $_[0] }", "sub f { return $_[0] }", "sub f { return undefined_function() }", "sub f { return (",
        "sub f { 1 while 1 }", "sub f { exit(0) }",
        'use Data::Compare;\nunless (Compare([f(2)], [6])) { die "test case 0 did not pass." }',
    ),
    "ruby": (
        "def f(x)\n  3 * x\nend", "def f(x)\n  x\nend", "def f(x)\n  nil.length\nend", "def f(x", "def f(x)\n  loop {}\nend",
        "def f(x)\n  exit!(0)\nend", 'raise StandardError, "Error at test case 1" if f(2) != 6',
    ),
    "php": (
        "<?php\nfunction f($x) { return 3 * $x; }", "<?php\nfunction f($x) { return $x; }",
        "<?php\nfunction f($x) { return nothing($x); }", "<?php\nfunction f($x { return $x; }",
        "<?php\nfunction f($x) { while (true); }", "<?php\nfunction f($x) { exit(0); }",
        'if (f(2) != 6) { throw new Exception("Error at 1th assert statement."); }',
    ),
    "go": (
        "package main\nfunc f(x int) int { return 3 * x }", "package main\nfunc f(x int) int { return x }",
        "package main\nfunc f(x int) int { return []int{}[x] }", "package main\nfunc f(x int { return x }",
        "package main\nfunc f(x int) int { for { x++ } }",
        'package main\nimport "os"\nfunc f(x int) int { os.Exit(0); return x }',
        'func main() {\n\tif f(2) != 6 {\n\t\tpanic("test case 0 failed to pass")\n\t}\n}',
    ),
}  # fmt: skip
OUTCOMES = ("passed", "wrong_answer", "runtime_error", "syntax_error", "timeout", "runtime_error")
HERE = "f"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as box:
        yield box


def check_of(language: str, tests: str) -> Check:
    return Check("source", HERE, test_code=tests, language=language)


def require(sandbox: Sandbox, language: str) -> None:
    if reason := sandbox.missing(language):
        pytest.skip(reason)


def test_every_language_has_programs() -> None:
    assert PROGRAMS.keys() == LANGUAGES.keys()


@pytest.mark.parametrize("language", LANGUAGES)
def test_outcome_classes(sandbox: Sandbox, language: str) -> None:
    require(sandbox, language)
    *programs, tests = PROGRAMS[language]
    # Time enough for a JVM on a busy machine; the endless program uses all of it.
    verdicts = [sandbox.run(program, check_of(language, tests), 4.0) for program in programs]
    assert tuple(verdict.outcome for verdict in verdicts) == OUTCOMES, [
        verdict.detail for verdict in verdicts
    ]
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert verdicts[0].isolation == sandbox.isolation


@pytest.mark.parametrize(
    ("language", "program"),
    [
        ("python", "x = bytearray(8 << 30)\ndef f(x): return 6"),
        ("javascript", "const hoard = []; while (true) hoard.push(new Array(1 << 16).fill(1.5));"),
        ("java", "class A { static int f(int x) { return new long[1 << 28].length; } }"),
        ("cpp", "#include <vector>\n#include <stdexcept>\nusing namespace std;\nint f(int x) { return vector<char>(8ull << 30).size(); }"),
        ("perl", 'my $hoard = "x" x (1 << 33); sub f { 6 }'),
        ("ruby", 'def f(x)\n  ("x" * (1 << 33)).length\nend'),
        ("php", '<?php\nfunction f($x) { return strlen(str_repeat("x", 1 << 33)); }'),
    ],
)  # fmt: skip
def test_memory_is_bounded(sandbox: Sandbox, language: str, program: str) -> None:
    require(sandbox, language)
    verdict = sandbox.run(program, check_of(language, PROGRAMS[language][-1]), 10.0)
    assert verdict.outcome == "memory", verdict


def test_a_language_without_tools_is_missing_by_name(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sandbox.missing("cobol") == "cobol: this sandbox has no way to run it"
    verdict = sandbox.run("x", check_of("cobol", "y"), 1.0)
    assert (verdict.outcome, verdict.passed) == ("sandbox_error", False)
    monkeypatch.setenv("PATH", "")
    with Sandbox() as bare:
        assert bare.missing("perl") == "perl: perl not found"
        assert bare.missing("python") == ""


def test_a_language_whose_tools_do_not_work_inside_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bin" / "perl"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent))
    with Sandbox() as box:
        assert "perl: does not work under" in box.missing("perl")
        assert "exit status" in box.missing("perl")


def test_tests_may_be_a_unittest_class_beside_the_program(sandbox: Sandbox) -> None:
    tests = "import unittest\nfrom answer import f\n\n\nclass Test(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(2), 6)\n"
    check = Check("source", "f", test_code=tests, module="answer")
    assert sandbox.run("def f(x):\n    return 3 * x\n", check, 10.0).passed
    wrong = sandbox.run("def f(x):\n    return x\n", check, 10.0)
    assert wrong.outcome == "wrong_answer", wrong


STDIN = Check("stdin", "main", inputs=(("2\n",), ("5\n",)), expected=("6\n", "15"))


@pytest.mark.parametrize(
    ("program", "outcome", "score"),
    [
        ("print(3 * int(input()))", "passed", 1.0),
        ("print(float(3 * int(input())))\nprint()", "passed", 1.0),
        ("print(6)", "wrong_answer", 0.5),
        ("print(3 * int(input()), 'extra')", "wrong_answer", 0.0),
        ("x = int(input())\nprint(3 * x if x < 3 else [][x])", "runtime_error", 0.5),
        ("print(", "syntax_error", 0.0),
        ("while True: pass", "timeout", 0.0),
        ("print('6' * (4 << 20))", "wrong_answer", 0.0),
        ("import sys\nwhile True: sys.stdout.write('x' * (1 << 20))", "runtime_error", 0.0),
    ],
)
def test_programs_that_print(sandbox: Sandbox, program: str, outcome: str, score: float) -> None:
    verdict = sandbox.run(program, STDIN, 3.0)
    assert (verdict.outcome, verdict.score) == (outcome, score), verdict


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("1 2\n3", "1 2\n3\n\n", True),
        ("1.50", "1.5", True),
        ("1 2", "1  2", True),
        ("yes", "Yes", False),
        ("1\n2", "1 2", False),
        ("1152921504606846976", "1152921504606846977", False),
        ("a b", "a c", False),
        ("", "0", False),
    ],
)
def test_lines_are_compared_as_contests_do(expected: str, printed: str, same: bool) -> None:
    assert same_lines(expected, printed) is same


@pytest.mark.parametrize(
    "check",
    [
        Check("stdin", "main"),
        Check("stdin", "main", inputs=(("1",),), expected=("1",), language="perl"),
        Check("source", "f", language="perl"),
        Check("source", "f", test_code="x", language="perl", module="answer"),
        Check("script", "f", test_code="def check(c): pass", language="perl"),
    ],
)
def test_a_malformed_check_is_an_error(sandbox: Sandbox, check: Check) -> None:
    with pytest.raises(ValueError, match="check"):
        sandbox.run("x", check, 1.0)


# Each tries to pass or to harm from inside a language that has no checker of its own; none may pass.
ATTACKS = {
    "prints what tests print": ("perl", 'print "passed\\nOK\\n1..1\\nok 1\\n"; exit 0;'),
    "ends in a destructor": ("perl", "END { $? = 0 }\nsub f { 0 }"),
    "skips the tests": ("perl", "sub f { 0 }\n__END__\n"),
    "opens a comment over the tests": ("javascript", "function f(x) { return 0 }\n/*"),
    "closes the script": ("php", "<?php\nfunction f($x) { return 0; }\n?>"),
    "catches what tests throw": ("javascript", "process.on('uncaughtException', () => process.exit(0)); function f(x) { return 0 }"),
    "replaces the assertion": ("javascript", "const load = require; require = () => ({isEqual: () => true}); function f(x) { process.exit(0) }"),
    "handles the end": ("php", "<?php\nregister_shutdown_function(function () { exit(0); });\nfunction f($x) { return 0; }"),
    "another main": ("cpp", "#include <stdexcept>\nusing namespace std;\nint f(int x) { return 0; }\nstruct S { S() { _Exit(0); } } s;"),
    "halts the machine": ("java", "class A { static { Runtime.getRuntime().halt(0); } static int f(int x) { return 0; } }"),
    "replaces itself": ("perl", 'exec "/bin/true";'),
    "kills its parent": ("perl", "kill 9, getppid(); kill 9, -1; sub f { 0 }"),
    "kills the supervisor from a fork": ("perl", "if (!fork) { kill 9, 1; exit } wait; sub f { 0 }"),
    "writes to every descriptor": ("perl", 'for my $fd (3 .. 63) { if (open(my $o, ">&=", $fd)) { print $o "x" x 100; } }\nexit 0;'),
    "forks for ever": ("perl", "fork while 1;"),
    "leaves a daemon": ("perl", "if (!fork) { setpgrp; if (!fork) { sleep 1 while 1 } exit } exit 0;"),
    "fills the disk": ("perl", 'for (1 .. 1e6) { open(my $o, ">", "file$_"); print $o "x" x (1 << 24); close $o }'),
    "prints for ever": ("perl", 'print "x" x 65536 while 1;'),
    "ignores signals": ("perl", '$SIG{$_} = "IGNORE" for keys %SIG; 1 while 1;'),
}  # fmt: skip


def descendants(root: int) -> set[int]:
    """Live processes below `root`, as the host sees them."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_passes_or_stays(name: str) -> None:
    language, program = ATTACKS[name]
    with Sandbox(Limits(tool_scratch_bytes=16 << 20)) as box:
        require(box, language)
        zygote, processes = box.zygote_pid, descendants(box.zygote_pid)
        folders = [f for f in os.listdir(tempfile.gettempdir()) if f.startswith("fewstep-sandbox-")]
        started = time.monotonic()
        verdict = box.run(program, check_of(language, PROGRAMS[language][-1]), 3.0)
        assert time.monotonic() - started < 70.0
        assert not verdict.passed, verdict
        assert verdict.score == 0.0
        assert verdict.outcome != "sandbox_error", verdict
        assert box.zygote_pid == zygote
        assert descendants(zygote) == processes
        assert [f for f in os.listdir(tempfile.gettempdir()) if f.startswith("fewstep-sandbox-")] == folders


def told(sandbox: Sandbox, expression: str) -> str:
    """What a Perl expression is worth inside, told through the error stream."""
    verdict = sandbox.run(
        "sub f { 6 }", check_of("perl", f'die "Error: told [" . join(",", {expression}) . "]\\n";'), 5.0
    )
    return verdict.detail.partition("told [")[2].partition("] (exit")[0]


def test_the_walls_are_those_of_python(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(sandbox, "perl")
    monkeypatch.setenv("API_KEY", "canary")
    with Sandbox() as fresh:
        assert "API_KEY" not in told(fresh, "sort keys %ENV")
    # The table names uids from 0x60000000 on; a program has one of them and no capability.
    if "uid" in sandbox.isolation.split("+"):
        assert int(told(sandbox, "$<")) >= 0x60000000
    if "mountns" in sandbox.isolation:
        (tmp_path / "canary").write_text("secret")
        assert told(sandbox, f'-e "{tmp_path}/canary" ? 1 : 0') == "0"
        assert told(sandbox, 'glob("/proc/*")') == ""
        assert told(sandbox, "sort(glob('*'), glob('.e*'))") == ".errors,Companion.pm,main.pl"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        attempt = f'do {{ require IO::Socket::INET; IO::Socket::INET->new("127.0.0.1:{port}") ? "open" : "closed" }}'
        assert told(sandbox, attempt) == "closed"
        with pytest.raises(TimeoutError):
            server.accept()
