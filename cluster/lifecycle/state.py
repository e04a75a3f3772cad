"""What is known of a cluster that `fewstep up` started: one file, readable by its owner alone."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from fewstep.cluster.session import environment_of
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.errors import ResourceError

_FILE = "cluster.json"


@dataclass(frozen=True)
class Member:
    """A host's `ray start --block`.

    Attributes:
        pid, started: on that host, and the process's start time (a pid alone may be reused).
        folder: what was written there for it, the token among it; empty for the head, whose folder is the cluster's.
    """

    host: str
    pid: int
    started: str
    folder: str = ""


@dataclass(frozen=True)
class ClusterState:
    """Addresses and processes; `members[0]` is the head on this host."""

    address: str
    dashboard: str
    ssh: tuple[str, ...]
    members: tuple[Member, ...]


def token_file(folder: Path) -> Path:
    return folder.resolve() / "token"


def save(folder: Path, state: ClusterState) -> None:
    atomic_write_text(folder / _FILE, json.dumps(asdict(state), indent=2) + "\n")


def is_up(folder: Path) -> bool:
    """Whether a cluster was started from there, and not wholly ended since."""
    return (folder / _FILE).exists()


def load(folder: Path) -> ClusterState:
    """Raises ResourceError: no cluster was started from there."""
    try:
        data = json.loads((folder / _FILE).read_text())
    except FileNotFoundError as error:
        raise ResourceError(
            str(folder), "no cluster", "the folder of a cluster that is up", "start one with `fewstep up`"
        ) from error
    members = tuple(Member(**member) for member in data["members"])
    return ClusterState(data["address"], data["dashboard"], tuple(data["ssh"]), members)


def forget(folder: Path) -> None:
    (folder / _FILE).unlink(missing_ok=True)
    token_file(folder).unlink(missing_ok=True)


def member_environment(token: str | Path) -> dict[str, str]:
    """Variables of a process that belongs to the cluster: it shows, and asks for, the token in that file."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}


def as_member(folder: Path) -> AbstractContextManager[None]:
    """This process shows the cluster's token for the length of a block."""
    return environment_of(member_environment(token_file(folder)))
