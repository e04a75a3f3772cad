"""A job's run in MLflow, from its first tag: the same beginning for every job.

A job that goes on with what its folder holds goes on with its run: `tracking.json` in the job's folder says which one that is.
"""

from __future__ import annotations

import difflib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fewstep.platform.artifacts import atomic_write_text, remove_unfinished
from fewstep.platform.config import Config, render_config
from fewstep.platform.mlflow_store import project_uri, shown_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.run_tags import environment_text

IDENTITY_FILE, CONFIG_FILE = "tracking.json", "config.yaml"


@dataclass(frozen=True)
class RunPlan:
    """What a job knows about its run before it starts.

    Attributes:
        kind: the command's name; the first word of the run's name.
        config: the resolved configuration.
        out: the job's folder; the last part is the second word of the name.
        tracking_uri: the store; None = the project's.
        experiment: made when missing.
        description: Markdown, at the top of the run's page.
        resumed: the job goes on with what is in `out`.
        required: a store that does not answer at the start is an error.
        tags: what the job adds to the tags every run has.
    """

    kind: str
    config: Config
    out: Path
    tracking_uri: str | None
    experiment: str
    description: str
    resumed: bool
    required: bool
    tags: Mapping[str, str]


@contextmanager
def tracked_run(plan: RunPlan) -> Iterator[MlflowTracker]:
    """The run, open, with its parameters, configuration and environment; ends with the block's status.

    Writes config.yaml and tracking.json into `plan.out`.

    Raises:
        ConfigError: an address or an experiment that cannot be used.
        ResourceError: a store that does not answer, at the start of a new run that requires it. A run that goes on has
            proved its address before, and starts without it.
    """
    uri = project_uri(plan.tracking_uri)
    plan.out.mkdir(parents=True, exist_ok=True)
    remove_unfinished(plan.out)
    key = _known_key(plan, uri)
    text, path = render_config(plan.config), plan.out / CONFIG_FILE
    earlier = path.read_text() if path.is_file() else ""
    own = key or secrets.token_hex(16)
    tracker = MlflowTracker(
        uri,
        experiment=plan.experiment,
        run_name=f"{plan.kind}-{plan.out.name}-{own[:6]}",
        description=plan.description,
        tags=plan.tags,
        key=own,
        required=plan.required and not key,
    )
    with tracker:
        atomic_write_text(path, text)
        identity = {
            "uri": shown_uri(uri),
            "experiment": plan.experiment,
            "key": own,
            "run_id": tracker.run_id,
        }
        atomic_write_text(plan.out / IDENTITY_FILE, json.dumps(identity, indent=2) + "\n")
        tracker.log_params(plan.config.model_dump(mode="json"))
        if tracker.resumed:
            _log_second_copy(tracker, plan.out, earlier, text)
        else:
            tracker.log_artifact(path)
        atomic_write_text(plan.out / "environment.txt", environment_text())
        tracker.log_artifact(plan.out / "environment.txt")
        yield tracker


def read_identity(out: Path) -> dict[str, str]:
    """Which run a job's folder belongs to: uri, experiment, key, run_id; empty where none was tracked."""
    path = out / IDENTITY_FILE
    if not path.is_file():
        return {}
    found: dict[str, str] = json.loads(path.read_text())
    return found


def accelerator() -> str:
    """What the job computes on: the GPU's name, or `cpu`."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _known_key(plan: RunPlan, uri: str) -> str:
    """The key of the run to go on with; "" = a new one. A run in another store cannot be gone on with."""
    known = read_identity(plan.out) if plan.resumed else {}
    same = known.get("uri") == shown_uri(uri) and known.get("experiment") == plan.experiment
    return known["key"] if same else ""


def _log_second_copy(tracker: MlflowTracker, out: Path, earlier: str, text: str) -> None:
    """A dated copy of the configuration that a run goes on with, and what in it is not what it was."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    lines = list(
        difflib.unified_diff(
            earlier.splitlines(keepends=True),
            text.splitlines(keepends=True),
            "before",
            f"resumed {stamp}",
            n=1,
        )
    )
    for name, content in ((f"{stamp}.yaml", text), (f"{stamp}.diff", "".join(lines) or "no difference\n")):
        atomic_write_text(out / "resumed" / name, content)
        tracker.log_artifact(out / "resumed" / name, "resumed")
