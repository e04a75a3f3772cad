"""Configuration of `fewstep manifest`; free of torch and Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fewstep.platform.config import Config

Kind = Literal["raycluster", "rayjob", "rayservice", "slurm"]
_NAME = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"


class WorkerGroup(Config):
    """Equal worker nodes."""

    name: str = Field(default="workers", pattern=_NAME, max_length=40)
    replicas: int = Field(default=2, ge=0)
    max_replicas: int | None = Field(default=None, ge=0)
    """With the autoscaler on; null = `replicas`."""
    cpus: int = Field(default=8, ge=1)
    memory_gib: int = Field(default=32, ge=1)
    gpus: int = Field(default=0, ge=0)
    gpu_type: str = ""
    """Value of the node label `gpu_label` that its pods must have; empty = any."""
    gpu_label: str = "nvidia.com/gpu.product"
    tolerations: tuple[str, ...] = ()
    """Taints that its pods bear, `key` or `key=value`, with the effect NoSchedule; nvidia.com/gpu comes with `gpus`."""

    @model_validator(mode="after")
    def _grows(self) -> WorkerGroup:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError("max_replicas must be at least replicas")
        return self


class SlurmSettings(Config):
    """Of `kind=slurm`."""

    partition: str = ""
    time: str = Field(default="04:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
    """Of the whole job, [days-]hours:minutes:seconds."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 6379
    """Of Ray's head on the first node."""
    setup: tuple[str, ...] = ()
    """Shell lines before everything, such as `module load cuda` or the activation of an environment."""


class ManifestConfig(Config):
    """What runs, and on what. The job's own configuration is the one that runs on a laptop."""

    kind: Kind = "rayjob"
    name: str = Field(default="fewstep", pattern=_NAME, max_length=40)
    job: str = "refine"
    """The command of a rayjob or a Slurm job; a rayservice is always `serve`."""
    job_config: Path | None = None
    """The job's configuration file; read now, checked, and carried along. null = the job's defaults."""
    overrides: tuple[str, ...] = ()
    """`key=value` over it."""
    out: Path | None = None
    """File to write; null = print."""
    image: str = "fewstep:cpu"
    namespace: str = Field(default="default", pattern=_NAME)
    head_cpus: int = Field(default=4, ge=1)
    head_memory_gib: int = Field(default=16, ge=1)
    workers: tuple[WorkerGroup, ...] = (WorkerGroup(),)
    autoscale: bool = False
    """Ray's autoscaler adds and removes workers between `replicas` and `max_replicas`."""
    redis: str = ""
    """host:port of the Redis that keeps the head's state (GCS fault tolerance); empty = a head that dies ends the cluster."""
    redis_secret: str = ""
    """Kubernetes secret with the key `password`; empty = none."""
    token_secret: str = ""
    """Kubernetes secret with the key `auth_token` that Ray's servers demand (RAY_AUTH_MODE=token); empty = KubeRay's own."""
    claim: str = "fewstep-shared"
    """PersistentVolumeClaim (ReadWriteMany) mounted at `shared_folder` on every node; empty = none."""
    shared_folder: Path = Path("/shared")
    """Where runs and models are, the same path on every node; `out` of the job must be below it."""
    slurm: SlurmSettings = SlurmSettings()

    @model_validator(mode="after")
    def _consistent(self) -> ManifestConfig:
        names = [group.name for group in self.workers]
        if len(set(names)) < len(names):
            raise ValueError("worker groups need different names")
        if self.redis_secret and not self.redis:
            raise ValueError("redis_secret needs redis")
        if self.kind == "slurm" and len(self.workers) != 1:
            raise ValueError("a Slurm job has one group of equal workers")
        return self
