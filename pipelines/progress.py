"""Where an interrupted job stands: progress.json of its checkpoint, and whether it belongs to this job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.platform.errors import CheckpointError, ConfigError

FILE = "progress.json"


def write_progress(folder: Path, fingerprint: str, values: dict[str, Any]) -> None:
    """Put progress.json into a checkpoint that is being written."""
    (folder / FILE).write_text(json.dumps({"fingerprint": fingerprint, "values": values}))


def read_progress(checkpoint: Path, fingerprint: str, *, resume: bool) -> dict[str, Any] | None:
    """What the checkpoint says, or None where there is nothing to go on from. Looks only; changes nothing.

    Args:
        checkpoint: the run's checkpoint folder.
        fingerprint: configuration, data and starting weights of the job that asks.
        resume: False ignores a checkpoint.
    Raises:
        ConfigError: the checkpoint belongs to another job; starting over must be asked for.
        CheckpointError: it is damaged.
    """
    path = checkpoint / FILE
    if not (resume and path.is_file()):
        return None
    try:
        saved = json.loads(path.read_text())
        found, values = saved["fingerprint"], dict(saved["values"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            str(path),
            f"unreadable ({error})",
            "what a finished checkpoint holds",
            "remove it, or set resume=false",
        ) from error
    if found != fingerprint:
        raise ConfigError(
            "out",
            str(checkpoint.parent),
            "a folder without a checkpoint of another configuration, other data or other starting weights",
            "choose another out, or resume=false to start over",
        )
    return values
