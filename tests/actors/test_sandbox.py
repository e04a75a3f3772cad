"""Outcome classes, scores and the sandbox's own failures."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from threading import Timer

import pytest

from fewstep.actors.sandbox import launcher
from fewstep.actors.sandbox.sandbox import Limits, Sandbox
from fewstep.platform.errors import ResourceError
from fewstep.platform.records import Check

TRIPLE = Check("call", "f", inputs=tuple((x,) for x in range(4)), expected=tuple(3 * x for x in range(4)))
SCRIPT = Check("script", "f", test_code="def check(candidate):\n    assert candidate(2) == 6\n")


@pytest.fixture(scope="module", params=["auto", "off"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox(namespaces=request.param) as box:
        yield box


@pytest.mark.parametrize(
    ("program", "outcome", "score"),
    [
        ("def f(x): return 3 * x", "passed", 1.0),
        ("def f(x): return 2 * x", "wrong_answer", 0.25),
        ("def f(x): return float(3 * x)", "wrong_answer", 0.0),
        ("def f(x): return object()", "wrong_answer", 0.0),
        ("def f(x): return 3 * x if x != 2 else 1 / 0", "runtime_error", 0.75),
        ("def f(x): return 3 * x if x < 2 else exit()", "runtime_error", 0.5),
        ("def f(x: return x", "syntax_error", 0.0),
        ("f = '\0'", "syntax_error", 0.0),
        ("1 / 0", "runtime_error", 0.0),
        ("def g(x): return x", "runtime_error", 0.0),
        ("f = 3", "runtime_error", 0.0),
        ("def f(x): return [0] * 10**10", "memory", 0.0),
        ("x = bytearray(10**10)", "memory", 0.0),
        ("def f(x):\n    while x > 1: pass\n    return 3 * x", "timeout", 0.5),
        ("import time; time.sleep(60)", "timeout", 0.0),
    ],
)
def test_call_checks(sandbox: Sandbox, program: str, outcome: str, score: float) -> None:
    verdict = sandbox.run(program, TRIPLE, 0.5)
    assert (verdict.outcome, verdict.score) == (outcome, score), verdict.detail
    assert sum(verdict.tests) == score * 4
    assert verdict.isolation == sandbox.isolation


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("def f(x): return 3 * x", "passed"),
        ("def f(x): return 2 * x", "wrong_answer"),
        ("def f(x): return None", "wrong_answer"),
        ("def f(x): raise KeyError(x)", "runtime_error"),
        ("def f(x): exit(0)", "runtime_error"),
        ("def f(x: return x", "syntax_error"),
        ("def f(x): return [0] * 10**10", "runtime_error"),
        ("def f(x):\n    while True: pass", "timeout"),
    ],
)
def test_script_checks(sandbox: Sandbox, program: str, outcome: str) -> None:
    verdict = sandbox.run(program, SCRIPT, 0.5)
    assert verdict.outcome == outcome, verdict.detail
    assert verdict.passed == (verdict.score == 1.0)


def test_a_script_may_use_the_programs_other_functions_and_expect_its_errors(sandbox: Sandbox) -> None:
    code = """
def check(candidate):
    assert helper(candidate(1), by=2) == (6,)
    try:
        candidate("x" * 3)
    except ValueError:
        return
    raise AssertionError("no error")
"""
    program = """
def helper(x, by): return (x * by,)
def f(x):
    if isinstance(x, str): raise ValueError(x)
    return 3 * x
"""
    verdict = sandbox.run(program, Check("script", "f", test_code=code), 2.0)
    assert verdict.passed, verdict.detail


@pytest.mark.parametrize(
    ("program", "tests", "outcome"),
    [
        ("def f(x): return 3 * x", (True, True), "passed"),
        ("def f(x): return 3 * x if x < 3 else 0", (True, False), "wrong_answer"),
        ("def f(x): return 3 * x if x > 2 else [][x]", (False, True), "runtime_error"),
        ("def f(x):\n    if x < 3: return 3 * x\n    exit(0)", (True, False), "runtime_error"),
        ("def f(x):\n    if x < 3: import os; os._exit(0)\n    return 3 * x", (), "runtime_error"),
    ],
)
def test_parts_of_a_script_are_tests_of_their_own(
    sandbox: Sandbox, program: str, tests: tuple[bool, ...], outcome: str
) -> None:
    code = "def small(c):\n    assert c(2) == 6\n\n\ndef large(c):\n    assert c(9) == 27\n"
    verdict = sandbox.run(program, Check("script", "f", test_code=code, parts=("small", "large")), 2.0)
    assert (verdict.tests, verdict.outcome) == (tests, outcome), verdict
    assert verdict.score == sum(tests) / 2


def test_values_of_a_trusted_program_come_out_or_say_why_not(sandbox: Sandbox) -> None:
    assert sandbox.values("def f(x): return [x, 'a']", "f", [(1,), (None,)], 2.0) == [[1, "a"], [None, "a"]]
    assert (
        sandbox.values("def f(x): return 1 / x", "f", [(1,), (0,)], 2.0)
        == "runtime_error: ZeroDivisionError: division by zero"
    )
    assert "no answer within" in str(sandbox.values("def f(x):\n    while True: pass", "f", [(1,)], 0.3))
    assert "syntax_error" in str(sandbox.values("def f(", "f", [(1,)], 2.0))


@pytest.mark.parametrize("code", ["def check(candidate:\n", "1 / 0", "def verify(candidate): pass"])
def test_a_broken_check_is_nobodys_pass(sandbox: Sandbox, code: str) -> None:
    verdict = sandbox.run("def f(x): return x", Check("script", "f", test_code=code), 2.0)
    assert verdict.outcome == "sandbox_error"
    assert "check" in verdict.detail


def test_types_reach_the_program_and_come_back(sandbox: Sandbox) -> None:
    inputs = ((1, 2), [1.5, True, None], {"a": {1, 2}}, {3: b"x"}, 2**100, "\ud800")
    check = Check("call", "f", inputs=tuple((value,) for value in inputs), expected=inputs)
    assert sandbox.run("def f(x): return x", check, 2.0).passed


def test_every_call_gets_arguments_of_its_own(sandbox: Sandbox) -> None:
    check = Check("call", "f", inputs=(([1],), ([1],)), expected=([1, 1], [1, 1]))
    assert sandbox.run("def f(x):\n    x += x\n    return x", check, 2.0).passed


def test_equal_programs_get_equal_verdicts_from_every_zygote() -> None:
    check = Check("call", "f", inputs=((),), expected=("",))
    program = "import random\ndef f(): return repr([{str(i) for i in range(50)}, random.random()])"
    answers = set()
    for _ in range(2):
        with Sandbox() as box:
            # The answer itself is not told; whether it is the same is.
            first = box.run(program + "[:0]", check, 2.0)
            assert first.passed
            digest = (
                "import hashlib\n"
                + program
                + "\ng = f\ndef f(): raise KeyError(hashlib.md5(g().encode()).hexdigest())"
            )
            answers.add(box.run(digest, check, 2.0).detail)
    assert len(answers) == 1


def test_run_many_keeps_the_order(sandbox: Sandbox) -> None:
    programs = [f"def f(x): return {factor} * x" for factor in (3, 2, 3, 1)]
    verdicts = sandbox.run_many([(program, TRIPLE, 2.0) for program in programs])
    assert [verdict.passed for verdict in verdicts] == [True, False, True, False]


@pytest.mark.parametrize(
    ("check", "timeout"),
    [
        (Check("call", "f"), 1.0),
        (Check("call", "f", inputs=((1,),), expected=()), 1.0),
        (Check("script", "f"), 1.0),
        (TRIPLE, 0.0),
        (Check("call", "f", inputs=((object(),),), expected=(1,)), 1.0),
    ],
)
def test_a_malformed_check_is_an_error_and_does_not_hurt(
    sandbox: Sandbox, check: Check, timeout: float
) -> None:
    with pytest.raises(ValueError, match=r"check|timeout|plain data"):
        sandbox.run("def f(x): return x", check, timeout)
    assert sandbox.run("def f(x): return 3 * x", TRIPLE, 2.0).passed


def test_a_dead_zygote_is_replaced_and_the_program_run_again() -> None:
    with Sandbox() as box:
        before = box.zygote_pid
        os.kill(before, signal.SIGKILL)
        os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
        assert box.run("def f(x): return 3 * x", TRIPLE, 2.0).passed
        assert box.zygote_pid != before


def test_a_zygote_that_dies_with_its_program_is_replaced() -> None:
    with Sandbox() as box:
        before = box.zygote_pid

        killer = Timer(0.3, os.kill, (before, signal.SIGKILL))
        killer.start()
        verdict = box.run("import time\ntime.sleep(1)\ndef f(x): return 3 * x", TRIPLE, 5.0)
        killer.join()
        assert verdict.passed, verdict
        assert box.zygote_pid != before


def test_closing_leaves_no_process() -> None:
    box = Sandbox()
    pid = box.zygote_pid
    box.close()
    assert not os.path.exists(f"/proc/{pid}")


def test_long_programs_fail_unread() -> None:
    with Sandbox(Limits(program_bytes=100)) as box:
        verdict = box.run("#" * 200, TRIPLE, 1.0)
        assert verdict.outcome == "runtime_error"
        assert "100 bytes" in verdict.detail


def test_a_host_that_cannot_isolate_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "plans", lambda mode: [])
    with pytest.raises(ResourceError, match="sandbox isolation") as caught:
        Sandbox()
    assert "\n" not in str(caught.value)


# A process that may neither enter namespaces nor change its user id, on any host and as any user, asks for a sandbox.
DEPRIVED = """
import sys
from fewstep.actors.sandbox import linux
from fewstep.actors.sandbox.sandbox import Sandbox
from fewstep.platform.errors import ResourceError
from fewstep.platform.records import Check

linux.drop_capabilities()
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
linux.install_seccomp(linux.seccomp_program(own_pid=None, may_fork=True, may_make_directories=True))
try:
    with Sandbox(namespaces=sys.argv[1]) as box:
        verdict = box.run("def f(x): return 3 * x", Check("call", "f", inputs=((2,),), expected=(6,)), 2.0)
        print(verdict.outcome, box.isolation)
except ResourceError as error:
    print(error)
"""


def deprived(namespaces: str) -> str:
    command = [sys.executable, "-c", DEPRIVED, namespaces]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_the_users_own_id_is_not_fallen_back_to() -> None:
    message = deprived("auto")
    assert message.startswith("sandbox isolation: got a host that refuses (")
    assert "unshare: Operation not permitted" in message
    assert "allowed: namespaces, or root" in message
    assert 'Sandbox(namespaces="off")' in message
    assert "\n" not in message


def test_the_users_own_id_is_used_when_asked_for() -> None:
    outcome, isolation = deprived("off").split()
    assert outcome == "passed"
    assert not {"uid", "mountns"} & set(isolation.split("+"))


def test_the_zygote_lowers_the_limit_a_child_may_have_to_close_up_to() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Sandbox() as box:
        assert resource.prlimit(box.zygote_pid, resource.RLIMIT_NOFILE)[1] <= 4096
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_an_owner_with_many_open_files_leaks_none() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 5000:
        pytest.skip("this host allows too few open files to get past the zygote's limit")
    program = """
import os
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
def f(): return [fd for fd in range(5000) if is_open(fd)]
"""
    check = Check("call", "f", inputs=((),), expected=([0, 1, 2, 3],))
    resource.setrlimit(resource.RLIMIT_NOFILE, (5000, hard))
    canaries = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while canaries[-1] < 4100:
            canaries.append(os.dup(canaries[0]))
        with Sandbox() as box:
            verdict = box.run(program, check, 5.0)
    finally:
        for descriptor in canaries:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert verdict.passed, verdict
