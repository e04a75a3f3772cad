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
from tests.chaos.attack_corpus import ATTACKS, CALL, SCRIPT, SECRET

from fewstep.actors.sandbox import launcher
from fewstep.actors.sandbox.isolation import Plan
from fewstep.actors.sandbox.sandbox import Limits, Sandbox
from fewstep.platform.errors import ResourceError
from fewstep.platform.records import Check, Verdict

TIMEOUT_S = 0.5
GRACE_S = 2.0


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


def test_the_corpus_is_large_enough() -> None:
    assert len(ATTACKS) >= 40


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
