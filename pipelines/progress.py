"""Where an interrupted job stands: progress.json of its checkpoint, and whether it belongs to this job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.platform.errors import ActorDied, CheckpointError, ConfigError

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


def kept_rows(path: Path, first: int) -> list[dict[str, Any]]:
    """A run's reports, one JSON object a line, up to the step it goes on from; later ones are an attempt's that did not end.

    The file is left with these alone, empty where the run starts over.
    """
    lines = path.read_text().splitlines() if first and path.is_file() else []
    rows = [(line, json.loads(line)) for line in lines]
    kept = [(line, row) for line, row in rows if row["step"] <= first]
    path.write_text("".join(line + "\n" for line, _ in kept))
    return [row for _, row in kept]


@contextmanager
def told_how_to_resume(checkpoint: Path, num_steps: int, *, resume: bool, fresh: bool) -> Iterator[None]:
    """An ActorDied that ends the block says from which step the job can go on, and how.

    Args:
        checkpoint: the run's checkpoint folder.
        num_steps: of the whole job.
        resume: the job's own setting.
        fresh: the job goes on from nothing, so that a checkpoint here is an older run's and is removed.
    """
    if fresh:
        shutil.rmtree(checkpoint, ignore_errors=True)
    try:
        yield
    except ActorDied as error:
        path = checkpoint / FILE
        step = int(json.loads(path.read_text())["values"]["step"]) if path.is_file() else 0
        same = "the same command" if resume else "the same command with resume=true"
        way = f"{same} goes on from step {step} of {num_steps}"
        if not step:
            way = "there is no checkpoint yet: the same command starts over"
        raise ActorDied(error.who, f"{error.cause}; {way}") from error
