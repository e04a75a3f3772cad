"""One Ray session per process: started or joined here, and everything it started ends with it.

Why not a bare `ray.init()` (all seen with Ray 2.60):

- without an address it joins whatever cluster a stale file names, so the address is always explicit;
- its servers listen on every interface, so a local session requires a token of its own; left alone, Ray would
  save one in the user's home and other commands would then depend on the order in which things ran;
- a job-level `runtime_env` makes every worker wait for the runtime-environment agent (about a second each), so
  a local session hands its environment down by inheritance; only a joined cluster needs the `runtime_env`.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fewstep.cluster.session_guard import guarded
from fewstep.platform.errors import ResourceError
from fewstep.platform.ports import address_towards

logger = logging.getLogger(__name__)

# One thread each: two workers with two threads each thrash two cores, and a busy-waiting OpenMP thread takes
# the core from the next actor. DeepSpeed looks for its accelerator once, at import.
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}
_RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Idle workers made in advance compete with the start-up for the cores and may never be used.
    "RAY_prestart_worker_first_driver": "0",
    # Ray runs workers at nice 15, where a server's replicas yield to their own clients and to anything else.
    "RAY_worker_niceness": "0",
}
_SOCKET_PATH_LIMIT = 107  # bytes in sockaddr_un, less the terminator
_SESSION_SUFFIX = len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
_GRACE_S = 5.0


@dataclass(frozen=True)
class Session:
    """A live Ray session.

    Attributes:
        address: `host:port` of the cluster's control store.
        num_cpus: logical CPUs of the whole cluster.
        log_folder: where this node's Ray processes log.
    """

    address: str
    num_cpus: float
    log_folder: Path


@contextmanager
def ray_session(
    num_cpus: int | None = None,
    *,
    address: str | None = None,
    need: Mapping[str, float] | None = None,
    object_store_bytes: int = 256 * 2**20,
    keep_logs: Path | None = None,
) -> Iterator[Session]:
    """Start a local Ray (or join `address`) for the length of a `with` block.

    A SIGTERM inside the block is a KeyboardInterrupt there and leaves it as SystemExit(143), so the block's own
    clean-up runs as with Ctrl-C. After a
    SIGKILL of this process a guard (session_guard.py) ends what is left of a local Ray and removes its folder.

    Args:
        num_cpus: logical CPUs of a local cluster; None = the cores this process may use. Not for a joined one.
        address: `host:port` of a running cluster; None = a local one that ends with the block.
        need: resources that must be free at the start, such as {"CPU": 3.5}.
        object_store_bytes: shared memory of a local cluster's object store.
        keep_logs: if the block raises, Ray's logs of a local cluster are copied here before they are removed.
    Raises:
        ResourceError: the cluster cannot be reached, lacks what is needed, or a session is already open.
    """
    import ray

    if ray.is_initialized():
        raise ResourceError(
            "ray", "a session is already open in this process", "one at a time", "close it first"
        )
    if address is not None:
        if num_cpus is not None:
            raise ResourceError(
                "num_cpus", num_cpus, "nothing when joining a cluster", "drop it or the address"
            )
        opened = _joined(address)
    else:
        cpus = num_cpus if num_cpus is not None else len(os.sched_getaffinity(0))
        _check_before_start(need or {}, {"CPU": float(cpus)})
        opened = _local(cpus, object_store_bytes, keep_logs)
    with opened as session, _terminate_as_exit():
        require_resources(need or {})
        yield session


def free_resources() -> dict[str, float]:
    """What the cluster could still place, by resource name; needs an open session."""
    import ray

    return {name: float(value) for name, value in ray.available_resources().items()}  # type: ignore[no-untyped-call]


def require_resources(need: Mapping[str, float]) -> None:
    """Raise a ResourceError that says what is free unless everything in `need` is."""
    if need:
        _check_before_start(need, free_resources())


def _check_before_start(need: Mapping[str, float], free: Mapping[str, float]) -> None:
    for name, amount in need.items():
        if free.get(name, 0.0) + 1e-9 < amount:
            raise ResourceError(
                f"ray resource {name}",
                f"{amount:g} asked for",
                f"at most {free.get(name, 0.0):g} (free on the cluster)",
                "ask for fewer replicas or workers, or give the cluster more",
            )


@contextmanager
def _local(cpus: int, object_store_bytes: int, keep_logs: Path | None) -> Iterator[Session]:
    folder = _short_folder()
    with guarded(folder), environment_of({**WORKER_ENV, **_RAY_ENV, **_own_token(folder)}):
        before = set(_children(os.getpid()))
        try:
            context = _start_local(cpus, object_store_bytes, folder, before)
            log_folder = Path(context.address_info["session_dir"]) / "logs"
            yield Session(context.address_info["gcs_address"], float(cpus), log_folder)
        except BaseException:
            if keep_logs is not None:
                _copy_logs(folder, keep_logs)
            raise
        finally:
            with _no_interrupts():
                _stop_local(before)
                shutil.rmtree(folder, ignore_errors=True)


def _start_local(cpus: int, object_store_bytes: int, folder: Path, before: set[int]) -> Any:
    """ray.init, tried twice: its node must register within 30 s, which a crowded machine can miss."""
    import ray

    for last_try in (False, True):
        try:
            return ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=object_store_bytes,
                _temp_dir=str(folder),
            )
        except Exception as error:  # a start that fails is a bare Exception of Ray's
            _stop_local(before, grace_s=0.0)  # Ray does not end the processes of a start that failed
            if last_try or isinstance(error, ValueError):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ResourceError(
                    "ray",
                    f"no start ({reason})",
                    "a local Ray that starts within 30 s",
                    "free some CPU and memory",
                ) from error
            logger.warning("Ray did not start (%s); trying once more", error)


def _stop_local(before: set[int], grace_s: float = _GRACE_S) -> None:
    """Shut Ray down and make sure that every process begun since `before` was taken is gone."""
    import ray

    started = process_tree(set(_children(os.getpid())) - before)
    ray.shutdown()
    end_processes(started, grace_s)


@contextmanager
def _joined(address: str) -> Iterator[Session]:
    import ray

    host, port = _knock(address)
    with environment_of(_RAY_ENV):
        try:
            # Ray puts the folder it is called in at the head of every worker's import path, where a user's `datasets.py`
            # would pass for the library.
            with tempfile.TemporaryDirectory() as empty, chdir(empty):
                context: Any = ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": WORKER_ENV},
                    # Left to itself Ray asks the way to the internet, and a host without one cannot find its own node.
                    _node_ip_address=address_towards(host, port),
                )
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
            raise _no_cluster(address, error) from error
        try:
            cpus = float(ray.cluster_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]
            yield Session(address, cpus, Path(context.address_info["session_dir"]) / "logs")
        finally:
            with _no_interrupts():
                ray.shutdown()


def _knock(address: str) -> tuple[str, int]:
    """Host and port; fails within seconds if nobody listens there, where Ray itself retries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0):
            return host, int(port)
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ResourceError:
    reason = str(error).strip().splitlines()
    return ResourceError(
        f"ray address {address}",
        reason[0] if reason else type(error).__name__,
        "host:port of a running Ray cluster, and its RAY_AUTH_TOKEN_PATH if it asks for a token",
        "start it with `ray start --head`, or leave the address out for a local one",
    )


def _short_folder() -> Path:
    """A private temporary folder whose socket paths fit; removed with the session."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(parent)) + len("/fewstep-xxxxxxxx") + _SESSION_SUFFIX <= _SOCKET_PATH_LIMIT:
            return Path(tempfile.mkdtemp(prefix="fewstep-", dir=parent))
    raise ResourceError(
        "TMPDIR", tempfile.gettempdir(), "a path of at most 26 bytes", "set TMPDIR to a short path"
    )


@functools.cache
def _token() -> str:
    """One token a process: Ray reads it once and keeps it, whatever the file says later."""
    return secrets.token_hex(32)


def _own_token(folder: Path) -> dict[str, str]:
    """Environment that makes the new cluster demand a token, unless the user chose a mode."""
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(_token())
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


@contextmanager
def environment_of(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for this process and its children, then put back what was there."""
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    _reload_ray_flags()
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reload_ray_flags()


def _reload_ray_flags() -> None:
    # Ray's C++ side reads RAY_* when it is imported; someone may have imported it long before this session.
    if "ray" in sys.modules:
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return

    terminated = False

    def on_terminate(_signal: int, _frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        # Not SystemExit(143) at once: inside a waiting ray.get Ray turns any SystemExit into SystemExit(1), and
        # who cleans up on the way out could no longer tell a signal from a failure. Ctrl-C's exception it keeps.
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    except KeyboardInterrupt:
        if terminated:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """An impatient second Ctrl-C must not leave processes behind; the clean-up is bounded in time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _stat(pid: int) -> tuple[int, str, str] | None:
    """(parent, state, start time) of a process from /proc, None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[1]), fields[0], fields[19]


def process_start(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None once it has ended."""
    stat = _stat(pid)
    return None if stat is None or stat[1] == "Z" else stat[2]


def _children(*parents: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if (stat := _stat(pid)) is not None and stat[0] in parents]


def process_tree(roots: set[int]) -> dict[int, str]:
    """The roots and all their descendants, each with its start time (a pid alone may be reused)."""
    found, edge = set(roots), set(roots)
    while edge:
        edge = set(_children(*edge)) - found
        found |= edge
    return {pid: stat[2] for pid in found if (stat := _stat(pid)) is not None}


def _alive(processes: Mapping[int, str]) -> list[int]:
    return [
        pid
        for pid, start in processes.items()
        if (stat := _stat(pid)) is not None and stat[1] != "Z" and stat[2] == start
    ]


def end_processes(processes: Mapping[int, str], grace_s: float) -> None:
    """Wait for processes to end by themselves, then kill the rest and reap our own children among them."""
    deadline = time.monotonic() + grace_s
    while (left := _alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        if grace_s:
            logger.warning("Ray process %d outlived its session by %.0f s and was killed", pid, grace_s)
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue  # it ended between the look and the kill, or is somebody else's child


def _copy_logs(folder: Path, target: Path) -> None:
    for logs in folder.glob("session_2*/logs"):
        shutil.copytree(
            logs, target, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("*.sock")
        )
