"""Ends what a killed driver leaves of its local Ray: a program of its own that a session starts beside Ray.

Nothing inside a process can clean up after its own SIGKILL. Ray's servers and workers then end by themselves, but its
two agents of a node stay for a minute, and the session's folder for good (Ray 2.60). This program waits for the driver,
kills whatever still has a file of the session's private folder open for writing, which every process of Ray has (its
log), and removes the folder.

It imports nothing but the standard library, and runs isolated from the environment: it starts in 20 ms.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_S = 0.25
_PATIENCE_S = 10.0


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """For the length of the block a guard waits for this process's death, to end what writes into `folder` and remove it."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), os.path.realpath(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C on a terminal is the driver's to handle
    )
    try:
        yield
    finally:
        guard.kill()
        guard.wait()


def watch(driver: int, folder: str) -> None:
    """Return once the driver, this process's parent, is gone and nothing of its session is left."""
    while os.getppid() == driver:
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _PATIENCE_S
    # More than one round: a worker may have been on its way when its raylet died.
    while (left := writers(folder)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


def writers(folder: str) -> list[int]:
    """Processes of this user that have a file below `folder` open for writing."""
    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in numbers if pid != os.getpid() and _writes_into(pid, folder)]


def _writes_into(pid: int, folder: str) -> bool:
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith(f"{folder}/"):
                lines = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().splitlines()
                flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
                if flags & os.O_ACCMODE != os.O_RDONLY:
                    return True
    except OSError:  # it ended meanwhile, or is another user's
        return False
    return False


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
