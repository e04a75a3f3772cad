"""Programs that want a reward, or harm, without the right answer: what test_attacks.py and bench/sandbox.py run."""

from __future__ import annotations

from fewstep.platform.records import Check

SECRET = 7_391_846_205_117
CALL = Check("call", "f", inputs=((1,), (2,)), expected=(SECRET, SECRET + 1))
SCRIPT = Check("script", "f", test_code=f"def check(candidate):\n    assert candidate(1) == {SECRET}\n")

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
    "connect_everywhere": """
import socket
def f(x):
    for family, address in ((socket.AF_INET, ("127.0.0.1", 22)), (socket.AF_INET, ("127.0.0.1", 6379)),
                            (socket.AF_INET6, ("::1", 8265)), (socket.AF_UNIX, "\\0fewstep")):
        try:
            with socket.socket(family) as out:
                out.settimeout(0.05); out.connect(address); out.send(b'{"passed": true}')
                return 1
        except OSError: pass
    return 1
""",
    "kill_by_ctypes": """
import ctypes, os
libc = ctypes.CDLL(None)
def f(x):
    # As kill_everyone: all only where a pid namespace of its own is the world.
    for pid in (-1, 1, 2, 3) if os.getpid() == 1 else (os.getppid(), -os.getpgid(os.getppid())):
        libc.kill(pid, 9); libc.kill(pid, 19)
    return 1
""",
    "reset_every_signal_by_ctypes": """
import ctypes
libc = ctypes.CDLL(None)
for number in range(1, 65): libc.signal(number, 1)
libc.alarm(0); libc.setitimer(0, bytes(32), None)
def f(x):
    while True: pass
""",
    "symlinks_to_its_own_descriptors": """
import json, os, struct
body = json.dumps({"value": True}).encode()
for number in range(16):
    try:
        os.symlink(f"/proc/self/fd/{number}", f"link{number}")
        with open(f"link{number}", "wb") as file: file.write(struct.pack(">I", len(body)) + body)
    except OSError: pass
def f(x): return 1
""",
    "rewrite_its_memory_through_proc": """
import os
def f(x):
    try:
        with open("/proc/self/mem", "r+b") as memory:
            memory.seek(id(f)); memory.write(b"x" * 64)
    except OSError: pass
    os._exit(0)
""",
    "read_every_environment": """
import os, re
def f(x):
    for pid in ["self", os.getppid(), *range(1, 300)]:
        for name in ("environ", "cmdline", "stat", "cwd/check", "root/etc/shadow"):
            try: hit = re.search(rb"7\\d{12}", open(f"/proc/{pid}/{name}", "rb").read(1 << 20))
            except OSError: continue
            if hit: return int(hit[0])
    return 1
""",
    "climb_out_by_links": """
import os
def f(x):
    found = 0
    for target in ("/", "..", "../..", "/proc/1/root", "/proc/self/root/..", "/tmp", "/var/tmp", "/dev/shm"):
        try:
            os.symlink(target, "out"); found += len(os.listdir("out"))
            with open("out/fewstep-left-behind", "w") as file: file.write("x")
            os.unlink("out/fewstep-left-behind")
        except OSError: pass
        finally:
            try: os.unlink("out")
            except OSError: pass
    return 1
""",
    "forge_the_nonce": """
import itertools, json, os, struct
def f(x):
    for number in itertools.count():
        body = json.dumps({"passed": f"{number:032x}", "nonce": f"{number:032x}"}).encode()
        for fd in (1, 2, 3, 4, 5):
            try: os.write(fd, struct.pack(">I", len(body)) + body)
            except OSError: pass
""",
}
