"""`fewstep manifest`: the files, from the configuration that runs on a laptop."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import yaml

from fewstep.cluster.manifests.kuberay import job_files, ray_cluster, ray_job, ray_service
from fewstep.cluster.manifests.settings import ManifestConfig
from fewstep.cluster.manifests.slurm import sbatch
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.config import Config, load_config, render_config
from fewstep.platform.errors import ConfigError
from fewstep.platform.registry import nearest


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
    if config.kind == "rayservice":
        main = ray_service(config, job.model_dump(mode="json"), version)
    else:
        main = ray_cluster(config, version) if config.kind == "raycluster" else ray_job(config, version)
    return yaml.safe_dump_all([job_files(config, text), main], sort_keys=False)


def _job(config: ManifestConfig) -> Config:
    # Late: this module is named there.
    from fewstep.cluster.commands import COMMANDS

    name = "serve" if config.kind == "rayservice" else config.job
    runnable = sorted(name for name, command in COMMANDS.items() if command.ray)
    if config.kind in ("rayjob", "slurm") and name not in runnable:
        raise ConfigError(
            "job", repr(name), ", ".join(runnable), "choose one of them" + nearest(name, runnable)
        )
    job = load_config(COMMANDS[name].config_class(), config.job_config, config.overrides)
    out = getattr(job, "out", None)
    shared = Path(config.shared_folder)
    if config.kind in ("rayjob", "slurm") and isinstance(out, Path) and not out.is_relative_to(shared):
        raise ConfigError(
            f"{name}'s out", str(out), f"a folder below {shared}, which every node sees",
            f"add --overrides '[out={shared}/{out.name}]', or set shared_folder",
        )  # fmt: skip
    return job
