"""Configuration of `fewstep doctor`; free of torch and Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fewstep.platform.config import Config

Port = Annotated[int, Field(ge=1, le=65535)]


class DoctorConfig(Config):
    """What to look at, and how much must be there."""

    address: str = ""
    """host:port of a running Ray cluster: every node is looked at, and the nodes are compared. Empty = this host alone."""
    show: Literal["text", "json"] = "text"
    """json = one object, for programs."""
    build: bool = False
    """Really compile DeepSpeed's operator (up to a minute the first time); otherwise only look for a compiler."""
    bandwidth: bool = True
    """Measure gloo between two processes, and between this node and each other one."""
    tracking_uri: str = ""
    """MLflow store to reach; empty = the project's."""
    shared_folder: Path | None = None
    """A folder that must be the same one on every node."""
    redis: str = ""
    """host:port of the Redis that GCS fault tolerance uses; empty = none."""
    ports: tuple[Port, ...] = (6379, 8000, 8265)
    """Ports of this host that must be free: Ray's, the server's, the dashboard's. A cluster that runs holds its own."""
    min_disk_gb: float = Field(default=5.0, ge=0)
    min_shared_memory_gb: float = Field(default=0.5, ge=0)
    min_gloo_mb_per_s: float = Field(default=50.0, ge=0)
    max_clock_skew_s: float = Field(default=1.0, gt=0)
