"""`fewstep submit`, `logs`, `cancel`: jobs through Ray's job server, with this checkout's code as a wheel.

A `working_dir` would not do: the nodes' own installed package would still be the one that is imported. What is in
`py_modules` goes in front of it. The wheel goes there unpacked: packed, Ray would let pip install it, with every dependency
of it, and would take a wheel of the same version for the same code.

A job's paths mean what they mean to who submits it, since the head is this host: it runs in the folder that `submit` was given
in, and given again it finds its checkpoint there.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fewstep.platform
from fewstep.cluster.commands import load_job
from fewstep.cluster.lifecycle.settings import ClusterFolder, JobConfig, SubmitConfig
from fewstep.cluster.lifecycle.state import as_member, load
from fewstep.platform.config import render_config
from fewstep.platform.errors import ActorDied, ResourceError

_CHECKOUT = Path(next(iter(fewstep.platform.__path__))).resolve().parent


def submit(config: SubmitConfig) -> None:
    """Checks the job here, sends it, and shows its output.

    Raises:
        ConfigError: the job or its configuration is wrong; nothing was sent.
        ResourceError: no cluster answers.
        ActorDied: the job failed; its output says why.
    """
    job = load_job(config.job, config.job_config, config.overrides)
    state = load(config.folder)
    with _server(config) as client, tempfile.TemporaryDirectory() as folder:
        # Variables are the job's own matter: its session sets them, and Ray takes no variable from both.
        environment = {"py_modules": [str(unpacked(build_wheel(Path(folder))))]} if config.wheel else {}
        name = client.submit_job(
            entrypoint=_entrypoint(config.job, render_config(job), state.address),
            runtime_env=environment,
            metadata={"fewstep": config.job},
        )
        print(f"job {name}", flush=True)
        if config.follow:
            _follow(client, name)


def logs(config: JobConfig) -> None:
    """A job's output from its start until it ends. Raises ResourceError, and ActorDied if it failed."""
    with _server(config) as client:
        _follow(client, _job(client, config.id))


def cancel(config: JobConfig) -> None:
    """Ends a job; what it has checkpointed stays. Raises ResourceError."""
    with _server(config) as client:
        name = _job(client, config.id)
        client.stop_job(name)
        print(f"cancelled {name}")


def build_wheel(folder: Path) -> Path:
    """This checkout as a wheel. Raises ResourceError: the package is not a checkout, or the build failed."""
    if not (_CHECKOUT / "pyproject.toml").is_file():
        raise ResourceError(
            "wheel",
            f"fewstep {importlib.metadata.version('fewstep')} without its source",
            "a checkout",
            "set wheel=false",
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
    ]
    done = subprocess.run(
        [*command, str(folder), str(_CHECKOUT)], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["nothing was built"])[-1]
        raise ResourceError("wheel", reason, "a checkout that builds", "set wheel=false, or repair the build")
    return wheels[0]


def unpacked(wheel: Path) -> Path:
    """The package folder of a wheel, beside it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent)
    return wheel.parent / "fewstep"


def _entrypoint(job: str, text: str, address: str) -> str:
    """The shell command of a job with that configuration, in this process's working folder."""
    here, python = shlex.quote(str(Path.cwd())), shlex.quote(sys.executable)
    # -P: what lies in the working folder must not pass for the package, or for the standard library's `platform`.
    return (
        f"d=$(mktemp -d) && printf %s {shlex.quote(text)} > $d/job.yaml && cd {here} && "
        f"exec {python} -P -m fewstep {job} $d/job.yaml --ray-address {address}"
    )


@contextmanager
def _server(config: ClusterFolder) -> Iterator[Any]:
    from ray.job_submission import JobSubmissionClient

    state = load(config.folder)
    with as_member(config.folder):
        try:
            yield JobSubmissionClient(state.dashboard)
        except (ConnectionError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ResourceError(
                state.dashboard, reason, "the job server of a cluster that is up", "look at `fewstep status`"
            ) from error


def _job(client: Any, name: str) -> str:
    known = sorted(
        (job for job in client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0
    )
    if not known:
        raise ResourceError("job", "none", "a submitted job", "use `fewstep submit`")
    names = [str(job.submission_id) for job in known]
    if name and name not in names:
        raise ResourceError("job", name, ", ".join(names), "choose one of them")
    return name or names[-1]


def _follow(client: Any, name: str) -> None:
    async def show() -> None:
        async for text in client.tail_job_logs(name):
            print(text, end="", flush=True)

    asyncio.run(show())
    info = client.get_job_info(name)
    status = str(info.status.value)
    if status != "SUCCEEDED":
        raise ActorDied(f"job {name}", f"{status.lower()}: {' '.join(str(info.message).split())}")
