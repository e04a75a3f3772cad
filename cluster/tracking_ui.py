"""`fewstep ui`: MLflow's pages for the project's store, on loopback, until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field

from fewstep.platform.config import Config
from fewstep.platform.errors import ActorDied
from fewstep.platform.ports import free_port

_READY_S = 180.0
_GRACE_S = 15.0


class UiConfig(Config):
    """Which store to show, and where."""

    tracking_uri: str = ""
    """MLflow store; empty = MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    port: int = Field(default=5000, ge=0, le=65535)
    """Port on loopback; 0 = any free one."""


def run(config: UiConfig) -> None:
    """Serves until Ctrl-C or SIGTERM; for a store that is a server already, prints its address.

    Raises:
        ConfigError: no such store.
        ResourceError: the store does not answer, or the port is taken.
        ActorDied: MLflow ended by itself.
    """
    from fewstep.platform.mlflow_runs import RunStore
    from fewstep.platform.mlflow_store import experiment_page, project_uri, shown_uri

    uri = project_uri(config.tracking_uri)
    port = free_port("127.0.0.1", config.port)
    # Opened here first: what runs still had to tell is delivered, and a store that is not there is named.
    newest = RunStore(uri).runs(limit=1)
    page = experiment_page(newest[0].experiment_id) if newest else ""
    if urlsplit(uri).scheme in ("http", "https"):
        print(f"MLflow is at {shown_uri(uri).rstrip('/')}{page}", flush=True)
        return
    print("starting MLflow", flush=True)
    with serve_pages(uri, port) as (process, address):
        print(f"MLflow is at {address}{page}  (Ctrl-C ends it)", flush=True)
        code = process.wait()
    raise ActorDied("MLflow", f"it ended with exit code {code}")


@contextmanager
def serve_pages(uri: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """MLflow's server for the length of a `with` block: its process and its address. It ends with the block, and all
    that it started with it.

    Raises:
        ActorDied: it did not come up; carries the end of its log.
    """
    from fewstep.platform.mlflow_store import server_command

    command, extra = server_command(uri, port)
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="fewstep-ui-") as scratch:
        log = Path(scratch) / "server.log"
        with log.open("wb") as file:
            # A group of its own: the terminal's Ctrl-C reaches this process alone, which then ends the whole group.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **extra}, cwd=scratch,
            )  # fmt: skip
        try:
            _wait_ready(process, address, log)
            yield process, address
        finally:
            _end_group(process)


def _wait_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ActorDied("MLflow", f"it did not start: {_last_line(log)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5.0) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise ActorDied("MLflow", f"not ready after {_READY_S:.0f} s: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group, SIGKILL to what is left of it after a grace; waits for the end."""
    for number, grace_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    # The leader is reaped; members that outlived it were sent SIGKILL.
