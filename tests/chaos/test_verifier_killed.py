"""kill -9 of verifier workers in the middle of a batch: no verdict is lost, and no process stays."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.actors.verifier import VerifierPool
from fewstep.cluster.session import ray_session
from fewstep.platform.errors import ActorDied
from fewstep.platform.records import Check, Task

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(2):
        yield


def slow(index: int) -> tuple[Task, str]:
    check = Check("call", "f", inputs=((index,),), expected=(index + 1,))
    return Task(
        f"slow/{index}", "import time\ntime.sleep(0.02)\ndef f(x):\n", check, 5.0
    ), "    return x + 1\n"


def children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(folder.name))
    return found


def test_a_killed_worker_is_replaced_and_its_answers_judged() -> None:
    with VerifierPool(2) as pool:
        before = pool.pids()
        zygotes = children(before[0])
        assert zygotes
        killer = threading.Timer(0.3, os.kill, (before[0], signal.SIGKILL))
        killer.start()
        verdicts = pool.verify([slow(index) for index in range(120)])
        killer.join()
        assert len(verdicts) == 120
        assert all(verdict.passed for verdict in verdicts)
        assert pool.replaced == 1
        after = pool.pids()
        assert before[0] not in after
        assert before[1] in after
        deadline = time.monotonic() + 5.0
        while any(Path(f"/proc/{zygote}").exists() for zygote in zygotes) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{zygote}").exists() for zygote in zygotes)


def test_a_worker_that_died_between_batches_is_replaced() -> None:
    with VerifierPool(1) as pool:
        os.kill(pool.pids()[0], signal.SIGKILL)
        assert all(verdict.passed for verdict in pool.verify([slow(index) for index in range(3)]))


def test_workers_that_keep_dying_are_an_error_with_its_cause() -> None:
    task, _ = slow(0)
    hanging = (replace(task, timeout_s=30.0), "    import time\n    time.sleep(30)\n")
    with VerifierPool(1) as pool:
        stop = threading.Event()

        def keep_killing() -> None:
            killed: set[int] = set()
            while not stop.is_set():
                with contextlib.suppress(ActorDied):  # killed while it was asked
                    for pid in set(pool.pids()) - killed:
                        killed.add(pid)
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)

        killer = threading.Thread(target=keep_killing)
        killer.start()
        try:
            with pytest.raises(ActorDied, match="3 times"):
                pool.verify([hanging])
        finally:
            stop.set()
            killer.join()
