"""The facts every run carries as tags: who, where, with which code and versions."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, distributions, version

from fewstep.platform.artifacts import machine_info
from fewstep.platform.mlflow_store import process_tags, source_tags

_VERSIONS_SHOWN = ("fewstep", "torch", "ray", "deepspeed", "mlflow")
# What a launcher calls the job it started, by the variable it says so in.
_LAUNCHERS = {
    "SLURM_JOB_ID": "slurm_job",
    "RAY_JOB_ID": "ray_job",
    "KUBERNETES_POD_NAME": "pod",
    "GITHUB_RUN_ID": "github_run",
    "CI_JOB_ID": "ci_job",
}


def run_tags(description: str) -> dict[str, str]:
    """Commit and whether the tree had changes, machine, versions, launcher, host and process."""
    machine = {f"machine.{key}": str(value) for key, value in machine_info().items()}
    launcher = {f"launcher.{name}": os.environ[key] for key, name in _LAUNCHERS.items() if key in os.environ}
    source = source_tags()
    commit, dirty, _ = source["mlflow.source.git.commit"].partition("+dirty")
    return {
        "mlflow.note.content": description,
        **source,
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.dirty": str(bool(dirty)).lower(),
        **machine,
        **{f"version.{name}": _version(name) for name in _VERSIONS_SHOWN},
        **launcher,
        **process_tags(),
    }


def environment_text() -> str:
    """Every installed distribution with its version, one a line: enough to make the environment again."""
    found = {(item.metadata["Name"] or "").lower(): item.version for item in distributions()}
    return "".join(f"{name}=={number}\n" for name, number in sorted(found.items()) if name)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
