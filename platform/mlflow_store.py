"""Opening an MLflow store: addresses, one-time set-up, and runs whose process is gone."""

from __future__ import annotations

import getpass
import hashlib
import importlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fewstep.platform.artifacts import git_commit
from fewstep.platform.errors import ConfigError, ResourceError

PROJECT_STORE = "sqlite:///runs/mlflow.db"
"""Where the runs of a project are kept unless it says otherwise; relative to the folder a command is given in."""

_QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's own patience, seven tries of two minutes, would hide an outage for a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
# These announce on stderr each schema migration of a new store, each sampler, model example and version.
_CHATTY_LOGGERS = (
    "alembic",
    "mlflow.store.model_registry.abstract_store",
)
# The first writes a page for each failed statement; the failure itself is raised and told in one line. The second
# warns that an example did not run, which mlflow_models.py sees to.
_SHOUTING_LOGGERS = ("mlflow.store.db.utils", "mlflow.models.signature")
_CONNECT_TIMEOUT_S = 3.0

HOST_TAG, PID_TAG, STARTED_TAG = "fewstep.host", "fewstep.pid", "fewstep.pid_started"


def project_uri(given: str | None) -> str:
    """The store a command means: the one it was given, else MLFLOW_TRACKING_URI, else the project's."""
    return absolute_uri(given or os.environ.get("MLFLOW_TRACKING_URI", "") or PROJECT_STORE)


def spool_root(uri: str) -> Path:
    """Where runs keep what a store has not taken: beside a sqlite file, under `runs/` for any other store."""
    file = sqlite_file(uri)
    parent = file.parent if file is not None else Path("runs").resolve()
    return parent / "spool" / hashlib.sha256(uri.encode()).hexdigest()[:12]


def shown_uri(uri: str) -> str:
    """The address for messages and reports: without a password."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return uri.replace(f":{parts.password}@", ":***@", 1)


def sqlite_uri(folder: Path) -> str:
    """The store `mlflow.db` in a folder; artifacts go to `artifacts/` beside it."""
    return absolute_uri(f"sqlite:///{Path(folder) / 'mlflow.db'}")


def absolute_uri(uri: str) -> str:
    """A sqlite address with its path made absolute, so that it means the same file in any folder."""
    file = sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file}"


def sqlite_file(uri: str) -> Path | None:
    """The database file of a sqlite address, as an absolute path; None for any other store."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def import_mlflow(name: str = "mlflow") -> Any:
    """MLflow or one of its modules, imported late (2 s) and with telemetry off."""
    for variable, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    module = importlib.import_module(name)
    for logger in _CHATTY_LOGGERS:
        logging.getLogger(logger).setLevel(logging.WARNING)
    for logger in _SHOUTING_LOGGERS:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    return module


def open_client(uri: str, *, create: bool) -> Any:
    """A client of the store at `uri`; a new sqlite store is set up here, once, before any worker exists.

    Args:
        uri: `sqlite:////absolute/path/mlflow.db`, `http(s)://host:port`, or any database address MLflow knows.
        create: make a sqlite store that is not there; False = that is an error.
    Raises:
        ConfigError: an address MLflow no longer writes to, or a sqlite store that does not exist.
        ResourceError: the store does not answer, or its file cannot be opened.
    """
    file = sqlite_file(uri)
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        raise ConfigError(
            "tracking uri", uri, "sqlite:////absolute/path/mlflow.db, http://host:port or a database address",
            "MLflow retired the plain folder store; name a sqlite file in that folder",
        )  # fmt: skip
    if file is not None and not create and not file.is_file():
        raise ConfigError(
            "tracking uri", uri, "an existing sqlite store", "check the path, or run a job that tracks there"
        )
    if scheme in ("http", "https"):
        _require_listener(uri)
    mlflow = import_mlflow()
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store_error(uri, error) from error
    with reporting(uri):
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def reporting(uri: str) -> Iterator[None]:
    """Turns what a failing store raises into one line, a ResourceError; our own mistakes pass as they are."""
    mlflow, database = import_mlflow(), importlib.import_module("sqlalchemy.exc")
    try:
        yield
    # requests' errors are OSErrors.
    except (mlflow.exceptions.MlflowException, database.SQLAlchemyError, OSError) as error:
        raise store_error(uri, error) from error


def store_error(uri: str, error: Exception) -> ResourceError:
    """What a failing store raised, in one line."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ResourceError(
        "tracking store",
        f"{shown_uri(uri)}: {reason.replace(uri, shown_uri(uri))}",
        "a store that answers",
        "check the address and free space",
    )


def open_experiment(client: Any, uri: str, name: str) -> str:
    """The id of an experiment, made when missing.

    Raises:
        ConfigError: it was deleted.
    """
    mlflow = import_mlflow()
    found = client.get_experiment_by_name(name)
    if found is None:
        file = sqlite_file(uri)
        location = (file.parent / "artifacts").as_uri() if file is not None else None
        # The kind opens the experiment on training runs; without it the pages for chat traces come first.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=kind))
        except mlflow.exceptions.MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            "tracking experiment", f"{name}, which was deleted", "an active experiment",
            f"restore it (mlflow experiments restore -x {found.experiment_id}) or choose another name",
        )  # fmt: skip
    return str(found.experiment_id)


def source_tags() -> dict[str, str]:
    """Who ran what: MLflow's own tags for user, program and commit."""
    return {
        "mlflow.user": _user(),
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git_commit(),
    }


def process_tags() -> dict[str, str]:
    """Which process writes a run. The start time tells a reused pid apart."""
    return {
        HOST_TAG: socket.gethostname(),
        PID_TAG: str(os.getpid()),
        STARTED_TAG: _process_start(os.getpid()) or "",
    }


def close_abandoned_runs(client: Any, experiment_id: str) -> list[str]:
    """Marks KILLED the runs of this host that say RUNNING although their process is gone; returns their ids.

    Nothing inside a process can record its own SIGKILL, so the next one that opens the experiment does. Hosts are
    told apart by name: containers that share a store need host names of their own.
    """
    closed = []
    query = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment_id], filter_string=query, max_results=1000):
        tags = run.data.tags
        started = _process_start(int(tags.get(PID_TAG, "0")))
        if started is not None and started == tags.get(STARTED_TAG):
            continue
        client.set_tag(
            run.info.run_id, "fewstep.closed", "its process was gone when a later run opened the experiment"
        )
        client.set_terminated(run.info.run_id, "KILLED", end_time=_last_sign_of_life(client, run))
        closed.append(str(run.info.run_id))
    return closed


def how_to_open(uri: str) -> str:
    """The command that shows a store in a browser."""
    if urlsplit(uri).scheme in ("http", "https"):
        return f"open {shown_uri(uri)}"
    if uri == project_uri(None):
        return "fewstep ui"
    return f"fewstep ui --tracking-uri {shown_uri(uri)}"


def server_command(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The program that serves a store's pages on loopback, and the environment it needs."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", uri,
    ]  # fmt: skip
    # Job execution starts eight more processes (450 MB) for features that a run of ours does not use.
    return command, {**_QUIET_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def experiment_page(experiment_id: str) -> str:
    """The part of the address of an experiment's runs that follows the server's."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def run_page(experiment_id: str, run_id: str, page: str = "model-metrics") -> str:
    """The part of a run's address that follows the server's."""
    # Without the type, the pages for chat applications surround the run.
    return f"/#/experiments/{experiment_id}/runs/{run_id}/{page}?workflowType=machine_learning"


def _require_listener(uri: str) -> None:
    # MLflow's own client repeats a refused connection for minutes before it says so.
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ResourceError(
            "tracking uri",
            f"{shown_uri(uri)} ({error})",
            "a running MLflow server",
            "start it or correct the address",
        ) from error


def _process_start(pid: int) -> str | None:
    """When a live process started, in kernel ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists() or pid <= 0:
            return None
        return _answers_signal(pid)
    # The second field is the program's name in parentheses and may hold spaces and parentheses itself.
    fields = stat.rpartition(")")[2].split()
    state, ticks = fields[0], fields[19]
    return None if state in "ZX" else ticks


def _answers_signal(pid: int) -> str | None:
    """The coarse answer of a system without /proc: "" for a live process of unknown age."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # alive, and another user's
    return ""


def _last_sign_of_life(client: Any, run: Any) -> int:
    """Milliseconds since the epoch of the run's last metric, or of its start when it logged none."""
    stamps = [
        point.timestamp
        for key in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, key)
    ]
    return int(max([run.info.start_time, *stamps]))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user without an entry
        return "unknown"
