"""`fewstep manifest`: the files, from the configuration that runs on a laptop."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import yaml

from fewstep.cluster.deploy import ServeConfig
from fewstep.cluster.manifests.kuberay import job_files, ray_cluster, ray_job, ray_service
from fewstep.cluster.manifests.settings import ManifestConfig
from fewstep.cluster.manifests.slurm import sbatch
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.config import Config, load_config, render_config
from fewstep.platform.errors import ConfigError


def run(config: ManifestConfig) -> None:
    """Prints the manifest, or writes it to `out`.

    Raises:
        ConfigError: the job's own configuration is wrong, or its files would not be on the shared storage.
    """
    text = render(config)
    if config.out is None:
        print(text, end="")
        return
    atomic_write_text(config.out, text)
    print(f"wrote {config.out}")


def render(config: ManifestConfig) -> str:
    """One YAML file of several documents, or a Slurm script. Raises ConfigError."""
    job = _job(config)
    text = render_config(job)
    if config.kind == "slurm":
        return sbatch(config, text)
    version = importlib.metadata.version("ray")
    if isinstance(job, ServeConfig):
        main = ray_service(config, job, version)
    else:
        main = ray_cluster(config, version) if config.kind == "raycluster" else ray_job(config, version)
    return yaml.safe_dump_all([job_files(config, text), main], sort_keys=False)


def _job(config: ManifestConfig) -> Config:
    # Late: this module is named there.
    from fewstep.cluster.commands import load_job

    if config.kind == "rayservice":
        return _service(load_config(ServeConfig, config.job_config, config.overrides))
    job = load_job(config.job, config.job_config, config.overrides)
    out = getattr(job, "out", None)
    shared = Path(config.shared_folder)
    if config.kind in ("rayjob", "slurm") and isinstance(out, Path) and not out.is_relative_to(shared):
        raise ConfigError(
            f"{config.job}'s out", str(out), f"a folder below {shared}, which every node sees",
            f"add --overrides '[out={shared}/{out.name}]', or set shared_folder",
        )  # fmt: skip
    return job


def _service(job: ServeConfig) -> ServeConfig:
    if job.keys is None:
        raise ConfigError(
            "serve's keys", "none", "a file of API keys on the shared storage: a service listens beyond its host",
            "make one with `fewstep key NAME` and add --overrides '[keys=/shared/keys.json]'",
        )  # fmt: skip
    if job.front == "replicas":
        raise ConfigError("serve's front", job.front, "proxy", "a service is reached through Serve's proxies")
    return job
