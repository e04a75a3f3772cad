"""Configuration of `fewstep up`, `down`, `status`, `submit`, `logs` and `cancel`; free of torch and Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fewstep.cluster.doctor.settings import Port
from fewstep.platform.config import Config


class ClusterFolder(Config):
    """Which cluster."""

    folder: Path = Path("runs/cluster")
    """What `fewstep up` writes about its cluster: addresses, processes, the token."""


class UpConfig(ClusterFolder):
    """What to start. Every host needs the same fewstep at the same path, and the shared storage."""

    hosts: tuple[str, ...] = ()
    """SSH destinations that join as workers; empty = this host alone."""
    ssh: Annotated[tuple[str, ...], Field(min_length=1)] = ("ssh", "-o", "BatchMode=yes")
    """How a command gets to a host: these words, the host, and `sh -s`, whose input is the command."""
    node_ip: str = "127.0.0.1"
    """This host's address; with `hosts` the one that they reach it under."""
    port: Port = 6379
    dashboard_port: Port = 8265
    """Of the job server, on loopback."""
    num_cpus: int | None = Field(default=None, ge=0)
    """Logical CPUs of this host; null = its cores."""
    host_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of each other host; null = its cores."""
    object_store_mb: int = Field(default=256, ge=75)
    redis: str = ""
    """host:port of a Redis that keeps the head's state over a restart; empty = none."""


class StatusConfig(ClusterFolder):
    """How to print it."""

    show: Literal["text", "json"] = "text"


class SubmitConfig(ClusterFolder):
    """A job for the cluster; it goes on when this terminal is closed."""

    job: str = "refine"
    job_config: Path | None = None
    """The job's configuration file; null = its defaults."""
    overrides: tuple[str, ...] = ()
    """`key=value` over it."""
    wheel: bool = True
    """Send this checkout's code along, as its wheel has it; false = the nodes run what they have installed."""
    follow: bool = True
    """Show the job's output until it ends; Ctrl-C leaves the job running."""


class JobConfig(ClusterFolder):
    """A submitted job."""

    id: str = ""
    """What `fewstep submit` printed; empty = the newest job."""
