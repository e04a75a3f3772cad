"""Everything known of one run, from its folder or from its store: what comparing and reporting start from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.pipelines.settings import RECORDING
from fewstep.pipelines.tracked_run import CONFIG_FILE, read_identity
from fewstep.platform.config import read_mapping
from fewstep.platform.errors import ConfigError, UserError
from fewstep.platform.mlflow_runs import RunStore, StoredRun
from fewstep.platform.records import DecodePolicy, FrontierPoint, Rollout
from fewstep.platform.tracking import flatten_params
from fewstep.platform.trajectories import read_metadata, read_rollouts

_FILES = ("report.json", "history.jsonl", CONFIG_FILE, "figures", "answers", "resumed")


@dataclass(frozen=True)
class RunRecord:
    """A run and its files.

    Attributes:
        name: what the user may call it.
        folder: where its files are: the job's own folder, or what was fetched of its artifacts.
        report: report.json; empty where the job wrote none.
        config: its resolved configuration, flattened.
        history: one row of metrics a step; empty where there is none.
        stored: the run as its store has it; None where that could not be asked.
    """

    name: str
    folder: Path
    report: Mapping[str, Any]
    config: Mapping[str, str]
    history: Sequence[Mapping[str, float]]
    stored: StoredRun | None
    figures: Mapping[str, Path] = field(default_factory=dict)

    def frontiers(self) -> dict[str, list[FrontierPoint]]:
        """The measured frontiers: `before` and `after` of a refinement, one a benchmark and model of an evaluation, none
        of other jobs."""
        found = {"before": "frontier_before", "after": "frontier_after"}
        frontiers = {
            name: frontier_points(self.report[key]) for name, key in found.items() if key in self.report
        }
        for benchmark, measured in self.report.get("benchmarks", {}).items():
            for slot, one in measured["models"].items():
                frontiers[f"{benchmark}, {slot}"] = frontier_points(one["points"])
        return frontiers

    def final_frontier(self) -> list[FrontierPoint]:
        """That of the model the run ended with; empty where nothing was measured."""
        frontiers = self.frontiers()
        return frontiers.get("after") or next(iter(frontiers.values()), [])

    def answers(self, when: str) -> list[Rollout]:
        """The held-out answers of a side (`before`, `after`) at the policy that the report compares; maybe none."""
        path = self.folder / "answers" / f"{when}.parquet"
        return read_rollouts(path) if path.is_file() else []

    def prompts(self, when: str) -> dict[str, str]:
        """Prompt by task id, as far as the answers' file has them."""
        path = self.folder / "answers" / f"{when}.parquet"
        return dict(read_metadata(path).get("prompts", {})) if path.is_file() else {}


def load_run(reference: str, tracking_uri: str, scratch: Path) -> RunRecord:
    """Finds a run and its files.

    Args:
        reference: the folder of a job; or what `RunStore.find` takes.
        tracking_uri: the store.
        scratch: where files of a store are copied to.
    Raises:
        ConfigError: no such folder or run, or several.
        ResourceError: the store does not answer; a job's folder is read without it.
    """
    folder = Path(reference)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(
                "run",
                f"{reference}, a folder without {CONFIG_FILE}",
                "the `out` of a job",
                "name another folder",
            )
        return _record(folder.name, folder, _stored(folder, tracking_uri))
    store = RunStore(tracking_uri)
    stored = store.find(reference)
    own = scratch / stored.run_id
    for path in _FILES:
        store.fetch(stored.run_id, path, own)
    own.mkdir(parents=True, exist_ok=True)
    return _record(stored.name, own, stored)


def folder_record(folder: Path) -> RunRecord:
    """A run from its folder alone."""
    return _record(folder.name, folder, None)


def frontier_points(records: Sequence[Mapping[str, Any]]) -> list[FrontierPoint]:
    """A frontier from a report."""
    names = (
        "pass_at_1", "forwards_per_answer", "tokens_per_forward", "tokens_per_second", "num_tasks", "outcomes"
    )  # fmt: skip
    return [
        FrontierPoint(
            policy=DecodePolicy.model_validate(record["policy"]), **{name: record[name] for name in names}
        )
        for record in records
    ]


def config_difference(one: Mapping[str, str], two: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Keys whose values differ, with both values (`-` = not there), those that say nothing of the work left out."""
    keys = sorted(
        key
        for key in one.keys() | two.keys()
        if key.partition(".")[0] not in RECORDING and one.get(key) != two.get(key)
    )
    return {key: (one.get(key, "-"), two.get(key, "-")) for key in keys}


def _stored(folder: Path, tracking_uri: str) -> StoredRun | None:
    """The stored run of a job's folder; its own address is the right one, the given one stands in for it."""
    identity = read_identity(folder)
    if not identity:
        return None
    uri = identity["uri"] if "***" not in identity["uri"] else tracking_uri
    try:
        return RunStore(uri).find(identity["key"])
    except UserError:
        return None  # the folder says enough; what only the store knows is left out


def _record(name: str, folder: Path, stored: StoredRun | None) -> RunRecord:
    report = folder / "report.json"
    history = folder / "history.jsonl"
    config = folder / CONFIG_FILE
    flat = flatten_params(read_mapping(config)) if config.is_file() else dict(stored.params if stored else {})
    # The job's own files last, so that they win: the copies were made by an earlier report.
    images = [*sorted((folder / "figures").glob("*.png")), *sorted(folder.glob("*.png"))]
    return RunRecord(
        name=name,
        folder=folder,
        report=json.loads(report.read_text()) if report.is_file() else {},
        config=flat,
        history=[json.loads(line) for line in history.read_text().splitlines()] if history.is_file() else [],
        stored=stored,
        figures={path.stem: path for path in images},
    )
