"""A real MLflow server for tests, over sqlite or PostgreSQL, that can be killed and started again on its port."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from fewstep.platform.mlflow_store import server_command, sqlite_uri
from fewstep.platform.ports import free_port

_READY_S = 240.0


class TrackingServer:
    """One server, started at once; `kill` is SIGKILL to all of it, `start` brings it back on the same port and store."""

    def __init__(self, folder: Path, backend: str = "", port: int = 0, *, start: bool = True) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.backend = backend or sqlite_uri(folder)
        self.port = port or free_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        if start:
            self.start()

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        command, extra = server_command(self.backend, self.port)
        log = self.folder / "server.log"
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*command, "--artifacts-destination", str(self.folder / "artifacts")],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **extra}, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _READY_S
        while True:
            with contextlib.suppress(URLError, OSError), urlopen(f"{self.url}/health", timeout=5) as answer:
                assert answer.status == 200
                return
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=60)
            self._process = None


@contextlib.contextmanager
def tracking_server(folder: Path, backend: str = "") -> Iterator[TrackingServer]:
    server = TrackingServer(folder, backend)
    try:
        yield server
    finally:
        server.kill()


class NoPostgres(Exception):
    """Why PostgreSQL cannot be started here."""


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL of its own in a folder; yields its address.

    Raises:
        NoPostgres: Debian's packages or the Python driver are not installed, or this user may not run it.
    """
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise NoPostgres("no psycopg (test extra)") from None
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        raise NoPostgres("no /usr/lib/postgresql/*/bin/initdb (Debian package postgresql)")
    # PostgreSQL refuses to run as root: Debian's package brings a user for it.
    owner: dict[str, int] = {}
    if os.getuid() == 0:
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            raise NoPostgres("running as root, and there is no user postgres") from None
        owner = {"user": account.pw_uid, "group": account.pw_gid}
    binaries, data, port = (
        programs[-1].parent,
        Path(f"/tmp/fewstep-pg-{os.getpid()}-{free_port('127.0.0.1', 0)}"),
        free_port("127.0.0.1", 0),
    )
    data.mkdir(mode=0o700)
    if owner:
        os.chown(data, owner["user"], owner["group"])
    server = None
    try:
        done = subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "fewstep", "--auth=trust", "--no-sync"],
            capture_output=True, text=True, check=False, cwd="/", **owner,
        )  # fmt: skip
        if done.returncode:
            raise NoPostgres(f"initdb: {done.stderr.strip().splitlines()[-1]}")
        with (folder / "postgres.log").open("wb") as log:
            server = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", data, "-F"],
                stdout=log, stderr=log, cwd="/", **owner,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while subprocess.run(
            [binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "fewstep", "mlflow"],
            capture_output=True, check=False,
        ).returncode:  # fmt: skip
            if server.poll() is not None or time.monotonic() > deadline:
                raise NoPostgres((folder / "postgres.log").read_text().strip().splitlines()[-1])
            time.sleep(0.2)
        yield f"postgresql://fewstep:not-a-secret@127.0.0.1:{port}/mlflow"
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # fast shutdown
            server.wait(timeout=60)
        shutil.rmtree(data, ignore_errors=True)
