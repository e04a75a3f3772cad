"""Programs that want a reward, or harm, without the right answer. None may pass, outlive its deadline or leave anything.

Every program runs in every isolation the host gives: privileged, as anybody gets it, and without namespaces.
"""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep.actors.sandbox import launcher
from fewstep.actors.sandbox.isolation import Plan
from fewstep.actors.sandbox.sandbox import Limits, Sandbox
from fewstep.platform.errors import ResourceError
from fewstep.platform.records import Check, Verdict

SECRET = 7_391_846_205_117
CALL = Check("call", "f", inputs=((1,), (2,)), expected=(SECRET, SECRET + 1))
SCRIPT = Check("script", "f", test_code=f"def check(candidate):\n    assert candidate(1) == {SECRET}\n")
TIMEOUT_S = 0.5
GRACE_S = 2.0

# Each defines or prevents `f`; none knows SECRET.
ATTACKS = {
    "exit_while_loading": "import sys; sys.exit(0)",
    "hard_exit_while_loading": "import os; os._exit(0)",
    "exit_in_the_call": "def f(x): raise SystemExit(0)",
    "hard_exit_in_the_call": "import os\ndef f(x): os._exit(0)",
    "exit_from_a_thread": "import os, threading\nthreading.Timer(0.05, os._exit, (0,)).start()\ndef f(x):\n    while True: pass",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1",
    "print_verdicts": """
def f(x):
    for text in ("passed", '{"passed": true}', '{"outcome": "passed", "score": 1.0}', "OK", "1 passed"):
        print(text, flush=True)
""",
    "write_text_to_every_descriptor": """
import os
for fd in range(64):
    try: os.write(fd, b'{"passed": true}\\n' * 100)
    except OSError: pass
def f(x): return 1
""",
    "write_frames_to_every_descriptor": """
import json, os, struct
def frame(message):
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body
for fd in range(64):
    for message in ({"loaded": True}, {"passed": True}, {"passed": None}, {"passed": "0" * 32}, {"call": {}}, [], None,
                    {"value": True}, {"value": {"$any": 1}}, {"value": None}):
        try: os.write(fd, frame(message))
        except OSError: pass
os._exit(0)
""",
    "equal_to_everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return Any()
""",
    "integer_equal_to_everything": """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Any(1)
""",
    "class_that_claims_to_be_int": """
class Any:
    __class__ = int
    def __eq__(self, other): return True
def f(x): return Any()
""",
    "patch_builtins": """
import builtins, json, sys
class Never(Exception): pass
builtins.AssertionError = Never
builtins.all = builtins.any = builtins.isinstance = lambda *a: True
builtins.type = lambda *a: int
builtins.len = lambda x: 0
def f(x): return 1
""",
    "patch_the_harness": """
import sys
for name, module in list(sys.modules.items()):
    if "sandbox" in name:
        for attribute in dir(module):
            if attribute in ("same", "encode", "decode", "describe", "_guarded", "_call"):
                setattr(module, attribute, lambda *a, **k: {"value": True})
def f(x): return 1
""",
    "search_memory_for_the_answer": r"""
import gc, re, sys
def candidates():
    frame = sys._getframe()
    seen = []
    while frame:
        seen += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
        frame = frame.f_back
    stack, known = seen + gc.get_objects(), set()
    while stack and len(known) < 300_000:
        item = stack.pop()
        if id(item) in known: continue
        known.add(id(item))
        if type(item) is int and item > 10**12: yield item
        elif type(item) is str and (hit := re.search(r"assert candidate.1. == (\d+)", item)): yield int(hit[1])
        elif type(item) in (list, tuple, set, dict):
            stack += list(item.values()) if type(item) is dict else list(item)
found = list(candidates())
def f(x):
    likely = [n for n in found if 7 * 10**12 < n < 8 * 10**12] or [0]
    return likely[0] + x - 1
""",
    "read_other_memory": """
import ctypes, os, re
def f(x):
    for pid in list(range(1, 300)) + [os.getppid() + d for d in range(-20, 20)]:
        try:
            for line in open(f"/proc/{pid}/maps"):
                low, high = (int(part, 16) for part in line.split()[0].split("-"))
                with open(f"/proc/{pid}/mem", "rb") as memory:
                    memory.seek(low)
                    hit = re.search(rb"candidate\\(1\\) == (\\d+)", memory.read(min(high - low, 1 << 24)))
                    if hit: return int(hit[1])
        except (OSError, ValueError): pass
""",
    "trace_the_callers": """
import sys
def spy(frame, event, argument):
    for value in frame.f_locals.values():
        if type(value) is int and value > 10**12: raise SystemExit
    return spy
sys.settrace(spy); sys.setprofile(spy)
def f(x): return 1
""",
    "kill_everyone": """
import os, signal
def f(x):
    # Everyone only from inside a pid namespace: a sandbox that fails this test must not take the machine with it.
    for pid in (-1, *range(2, 300)) if os.getpid() == 1 else (os.getppid(), -os.getpgid(os.getppid())):
        try: os.kill(pid, signal.SIGKILL)
        except OSError: pass
    return 1
""",
    "ignore_every_signal_and_loop": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.setitimer(signal.ITIMER_REAL, 0)
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
    "loop_in_c": "def f(x): return sum(range(10**12))",
    "regular_expression": "import re\ndef f(x): return re.match(r'(a+)+$', 'a' * 40 + 'b')",
    "giant_integer": "def f(x): return 9 ** (9 ** 9)",
    "giant_answer": "def f(x): return 'x' * (50 << 20)",
    "many_answers": "def f(x): return [[]] * 100_000_000",
    "memory": "def f(x):\n    hoard = []\n    while True: hoard.append(bytearray(1 << 20))",
    "memory_by_pages_of_ones": "def f(x): return len(b'1' * (8 << 30))",
    "deep_recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "deep_source": "f = " + "(" * 5000 + ")" * 5000,
    "deep_answer": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "deep_frame": "import os, struct\nos.write(3, struct.pack('>I', 200_000) + b'[' * 200_000)\ndef f(x): return 1",
    "endless_frame": "import os\nwhile True: os.write(3, b'\\xff' * 4096)",
    "dripping_frame": """
import os, struct, time
os.write(3, struct.pack(">I", 1000))
while True:
    os.write(3, b" ")
    time.sleep(0.05)
""",
    "endless_output": "import sys\ndef f(x):\n    while True: sys.stdout.write('x' * 65536); sys.stderr.write('x' * 65536)",
    "fill_the_disk": """
def f(x):
    for number in range(10**6):
        with open(f"file{number}", "wb") as file: file.write(b"x" * (1 << 24))
""",
    "many_files": "def f(x):\n    for n in range(10**7): open(f'n{n}', 'w').close()",
    "fork_bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread_bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            for fd in range(64):
                try: os.write(fd, b"x")
                except OSError: pass
            time.sleep(0.01)
    os._exit(0)
def f(x): return 1
""",
    "daemon_and_leave": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nos._exit(0)",
    "close_the_channel": "import os\nos.closerange(0, 64)\nimport time\ntime.sleep(60)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "stop": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\ndef f(x): return 1",
}


@pytest.fixture(scope="module", params=["auto", "user", "off"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        box = Sandbox(Limits(scratch_bytes=8 << 20), namespaces=request.param)
    except ResourceError as error:
        if request.param == "auto":
            raise
        pytest.skip(str(error))
    with box:
        yield box


def descendants(root: int) -> set[int]:
    """Live processes below `root`, as the host sees them."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(name)] = int(fields[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def scratch_folders() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("fewstep-sandbox-")}


def attacked(sandbox: Sandbox, program: str, check: Check) -> Verdict:
    """The verdict of an attack, after looking for what it left behind."""
    zygote, processes, folders = sandbox.zygote_pid, descendants(sandbox.zygote_pid), scratch_folders()
    started = time.monotonic()
    verdict = sandbox.run(program, check, TIMEOUT_S)
    assert time.monotonic() - started < TIMEOUT_S + GRACE_S
    assert not verdict.passed
    assert verdict.score == 0.0
    assert verdict.outcome != "sandbox_error", verdict.detail
    assert sandbox.zygote_pid == zygote
    assert descendants(zygote) == processes
    assert scratch_folders() == folders
    return verdict


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_passes_a_call_check(sandbox: Sandbox, name: str) -> None:
    attacked(sandbox, ATTACKS[name], CALL)


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_passes_a_script_check(sandbox: Sandbox, name: str) -> None:
    attacked(sandbox, ATTACKS[name], SCRIPT)


def test_the_honest_answer_passes_both(sandbox: Sandbox) -> None:
    honest = f"def f(x): return {SECRET} + x - 1"
    assert sandbox.run(honest, CALL, TIMEOUT_S).passed
    assert sandbox.run(honest, SCRIPT, TIMEOUT_S).passed


def test_the_search_for_the_answer_finds_what_is_there(sandbox: Sandbox) -> None:
    # The attack of that name is worth something only if it finds the arguments, which are in its memory.
    check = Check("call", "f", inputs=((SECRET,),), expected=(SECRET + SECRET - 1,))
    assert sandbox.run(ATTACKS["search_memory_for_the_answer"], check, 2.0).passed


def told(sandbox: Sandbox, expression: str, setup: str = "") -> str:
    """What an expression evaluates to inside, told through the one text that comes out: an error's."""
    program = f"{setup}\ndef f(x): raise KeyError({expression})"
    return sandbox.run(program, CALL, TIMEOUT_S).detail.removeprefix("KeyError: ")


def test_the_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "canary")
    with Sandbox(namespaces="off") as fresh:
        for box in (sandbox, fresh):
            assert told(box, "dict(os.environ)", "import os") == "{}"


def test_the_network_is_out_of_reach(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        text = told(sandbox, f"socket.create_connection(('127.0.0.1', {port}), 1)", "import socket")
        assert "Error" in text
        with pytest.raises(TimeoutError):
            server.accept()


def test_descriptors_of_the_owner_are_not_inherited(sandbox: Sandbox) -> None:
    with tempfile.TemporaryFile() as canary:
        os.set_inheritable(canary.fileno(), True)
        setup = """
import os
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
"""
        assert told(sandbox, "[fd for fd in range(1000) if is_open(fd)]", setup) == "[0, 1, 2, 3]"


def test_a_file_outside_can_be_neither_read_nor_seen(sandbox: Sandbox, tmp_path: Path) -> None:
    if "mountns" not in sandbox.isolation:
        pytest.skip("no mount namespace in this isolation: files are guarded by the user id alone")
    canary = tmp_path / "canary"
    canary.write_text("secret")
    assert told(sandbox, f"os.path.exists({str(canary)!r})", "import os") == "False"
    assert told(sandbox, f"os.path.exists({__file__!r})", "import os") == "False"
    assert told(sandbox, "os.listdir('/proc')", "import os") == "[]"
    assert told(sandbox, "os.listdir('/tmp')", "import os") == "[]"


def test_the_python_installation_cannot_be_changed(sandbox: Sandbox) -> None:
    if "mountns" not in sandbox.isolation:
        pytest.skip("no mount namespace in this isolation: files are guarded by the user id alone")
    text = told(sandbox, "os.access(os.__file__, os.W_OK)", "import os")
    assert text == "False"


def test_one_program_leaves_nothing_for_the_next(sandbox: Sandbox) -> None:
    sandbox.run(
        "import builtins, math\nbuiltins.canary = 1\nmath.canary = 1\nopen('canary', 'w').close()", CALL, 1.0
    )
    setup = "import builtins, math, os"
    expression = "(hasattr(builtins, 'canary'), hasattr(math, 'canary'), os.listdir('.'))"
    assert told(sandbox, expression, setup) == "(False, False, [])"


def test_the_program_has_no_privileges(sandbox: Sandbox) -> None:
    setup = """
import ctypes
def capabilities():
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capget(header, data) == 0
    return sum(data)
"""
    assert told(sandbox, "capabilities()", setup) == "0"
    if "uid" in sandbox.isolation.split("+"):
        assert (
            told(sandbox, "os.getuid() >= 2**30 and os.getgid() >= 2**30 and not os.getgroups()", "import os")
            == "True"
        )


def test_what_needs_privileges_is_refused(sandbox: Sandbox) -> None:
    setup = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
attempts = {
    "chroot": lambda: os.chroot("/") or 0,
    "user namespace": lambda: libc.unshare(0x10000000),
    "mount": lambda: libc.mount(b"none", b".", b"tmpfs", 0, None),
    "trace": lambda: libc.ptrace(16, os.getppid(), 0, 0),
    "somebody": lambda: os.setresuid(12345, 12345, 12345) or 0,
    "socket": lambda: min(libc.socket(2, 1, 0), 0),
}
def succeeds(attempt):
    try: return attempt() == 0
    except OSError: return False
"""
    assert told(sandbox, "[name for name, attempt in attempts.items() if succeeds(attempt)]", setup) == "[]"


# Each does to its working folder what it may; {target} is a folder of the sandbox's owner.
FOLDER_ATTACKS = {
    "remove": "os.rmdir(here)",
    "remove_with_its_parent": "os.rmdir(here); os.rmdir(parent)",
    "rename": "os.rename(here, parent + '/moved')",
    "replace_by_a_link": "os.rmdir(here); os.symlink({target!r}, here)",
    "replace_by_a_file": "os.rmdir(here); open(here, 'w').close()",
    "replace_the_parent_by_a_link": "os.rmdir(here); os.rmdir(parent); os.symlink({target!r}, parent)",
    "replace_the_parent_by_a_file": "os.rmdir(here); os.rmdir(parent); open(parent, 'w').close()",
    "fill_the_parent": "open(parent + '/file', 'w').close(); os.symlink({target!r}, parent + '/link')",
    "lock": "open('file', 'w').close(); os.chmod(here, 0); os.chmod(parent, 0)",
    "link_inside": "os.symlink({target!r}, 'link'); os.symlink('/', 'root')",
}


@pytest.fixture(scope="module", params=["own user id", "the owner's user id"])
def mountless(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """The two isolations in which the working folder lies on the host."""
    own_uid = request.param == "own user id"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "plans", lambda mode: [Plan(False, False, own_uid)])
        try:
            box = Sandbox(namespaces="off")
        except ResourceError as error:
            pytest.skip(str(error))
    with box:
        yield box


def folder_attack(name: str, target: Path) -> str:
    act = FOLDER_ATTACKS[name].format(target=str(target))
    return f"""
import os
here = os.getcwd()
parent = os.path.dirname(here)
# A sandbox that fails this test must not take the machine's temporary folder with it.
if not os.path.basename(parent).startswith("fewstep-sandbox-"): raise ValueError(parent)
def f(x):
    try:
        {act}
    except OSError as error: raise KeyError(type(error).__name__)
    raise KeyError("done")
"""


@pytest.mark.parametrize("name", FOLDER_ATTACKS)
def test_no_program_turns_its_folder_against_the_zygote(
    mountless: Sandbox, name: str, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "canary").write_text("canary")
    target.chmod(0o711)
    verdict = attacked(mountless, folder_attack(name, target), CALL)
    own_uid = "uid" in mountless.isolation.split("+")
    came_of_it = "PermissionError" if own_uid and name != "link_inside" else "done"
    assert verdict.detail == f"KeyError: {came_of_it!r}"
    assert target.stat().st_mode & 0o7777 == 0o711
    assert (target / "canary").read_text() == "canary"
    honest = f"def f(x):\n    open('file', 'w').close()\n    return {SECRET} + x - 1"
    assert mountless.run(honest, CALL, TIMEOUT_S).passed
