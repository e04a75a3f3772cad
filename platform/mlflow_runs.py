"""Runs read back: listed, found by whatever a user calls them, their files fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.platform.errors import ConfigError
from fewstep.platform.mlflow_delivery import KEY_TAG
from fewstep.platform.mlflow_leftovers import deliver_leftovers
from fewstep.platform.mlflow_registry import model_run
from fewstep.platform.mlflow_store import close_abandoned_runs, import_mlflow, open_client, reporting

PARENT_TAG = "mlflow.parentRunId"
_SHORTEST_PREFIX = 4


@dataclass(frozen=True)
class StoredRun:
    """One run as its store has it.

    Attributes:
        data: its data sets: name, digest, context, source and profile of each.
        versions: registered versions that came from it, with their aliases, such as `fewstep-tiny/3@candidate,champion`.
    """

    run_id: str
    name: str
    status: str
    experiment_id: str
    experiment: str
    start_ms: int
    end_ms: int | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    data: tuple[Mapping[str, str], ...] = ()
    versions: tuple[str, ...] = field(default=())

    @property
    def parent_id(self) -> str:
        """The run it is nested under; empty for most."""
        return self.tags.get(PARENT_TAG, "")

    @property
    def seconds(self) -> float | None:
        """How long it took; None while it runs."""
        return None if self.end_ms is None else (self.end_ms - self.start_ms) / 1000.0


class RunStore:
    """A store opened to read. What earlier runs still had to tell it is delivered first, and dead runs are closed.

    Args:
        uri: the store; it must exist.
    Raises:
        ConfigError: no such store.
        ResourceError: it does not answer.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client = open_client(uri, create=False)
        deliver_leftovers(uri)
        with reporting(uri):
            self._experiments = {
                str(found.experiment_id): str(found.name)
                for found in self._client.search_experiments(max_results=1000)
            }
            for experiment_id in self._experiments:
                close_abandoned_runs(self._client, experiment_id)
            self._versions = self._versions_by_run()

    def runs(self, experiment: str = "", limit: int = 50) -> list[StoredRun]:
        """The newest runs, newest first; of one experiment, or of all.

        Raises:
            ConfigError: no such experiment.
        """
        chosen = [number for number, name in self._experiments.items() if experiment in ("", name)]
        if not chosen:
            raise ConfigError(
                "experiment", experiment, ", ".join(sorted(self._experiments.values())), "name one of them"
            )
        with reporting(self.uri):
            found = self._client.search_runs(
                chosen, max_results=limit, order_by=["attributes.start_time DESC"]
            )
        return [self._read(run) for run in found]

    def find(self, reference: str) -> StoredRun:
        """The run that a user means by its id, the beginning of it, its key, its name, or a model it made.

        Raises:
            ConfigError: none, or several (names them).
        """
        if reference.startswith("models:/"):
            reference = model_run(reference, self.uri)
        with reporting(self.uri):
            if re.fullmatch(r"[0-9a-f]{32}", reference):
                for query in (f"attributes.run_id = '{reference}'", f"tags.`{KEY_TAG}` = '{reference}'"):
                    if exact := self._client.search_runs(list(self._experiments), filter_string=query):
                        return self._read(exact[0])
        everything = self.runs(limit=1000)
        named = [run for run in everything if run.name == reference]
        if not named and len(reference) >= _SHORTEST_PREFIX:
            named = [run for run in everything if run.run_id.startswith(reference)]
        if len(named) == 1:
            return named[0]
        shown = [f"{run.run_id[:8]} ({run.name})" for run in (named or everything)[:8]]
        raise ConfigError(
            "run", f"{reference}, which is {'several runs' if named else 'no run of this store'}",
            f"a run id or its beginning, a name, a folder, or a model: {', '.join(shown) or 'the store is empty'}",
            "name one of them",
        )  # fmt: skip

    def children(self, run_id: str) -> list[StoredRun]:
        """The runs nested under a run, oldest first."""
        with reporting(self.uri):
            found = self._client.search_runs(
                list(self._experiments), filter_string=f"tags.`{PARENT_TAG}` = '{run_id}'", max_results=1000
            )
        return sorted((self._read(run) for run in found), key=lambda run: run.start_ms)

    def fetch(self, run_id: str, path: str, into: Path) -> Path | None:
        """A file or a folder of a run's artifacts, copied into a folder; None where the run has none of that name."""
        exceptions = import_mlflow("mlflow.exceptions")
        into.mkdir(parents=True, exist_ok=True)
        with reporting(self.uri):
            parent = path.rpartition("/")[0]
            if path not in {item.path for item in self._client.list_artifacts(run_id, parent or None)}:
                return None
            try:
                return Path(self._client.download_artifacts(run_id, path, str(into)))
            except exceptions.MlflowException as error:
                raise ConfigError(
                    path,
                    str(error).splitlines()[0],
                    "files the store still has",
                    "look at the artifact store",
                ) from error

    def _read(self, run: Any) -> StoredRun:
        info = run.info
        inputs = run.inputs.dataset_inputs if run.inputs is not None else []
        return StoredRun(
            run_id=str(info.run_id),
            name=str(info.run_name),
            status=str(info.status),
            experiment_id=str(info.experiment_id),
            experiment=self._experiments.get(str(info.experiment_id), ""),
            start_ms=int(info.start_time),
            end_ms=None if info.end_time is None or info.status == "RUNNING" else int(info.end_time),
            params=dict(run.data.params),
            metrics=dict(run.data.metrics),
            tags=dict(run.data.tags),
            data=tuple(_lineage(item) for item in inputs),
            versions=tuple(self._versions.get(str(info.run_id), ())),
        )

    def _versions_by_run(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for model in self._client.search_registered_models(max_results=100):
            aliases: dict[str, list[str]] = {}
            for alias, number in sorted(model.aliases.items()):
                aliases.setdefault(str(number), []).append(alias)
            for version in self._client.search_model_versions(f"name = '{model.name}'", max_results=1000):
                alias = ",".join(aliases.get(str(version.version), ()))
                label = f"{model.name}/{version.version}" + (f"@{alias}" if alias else "")
                found.setdefault(str(version.run_id), []).append(label)
        return found


def _lineage(item: Any) -> dict[str, str]:
    dataset = item.dataset
    context = next((tag.value for tag in item.tags if tag.key == "mlflow.data.context"), "")
    try:
        source = str(json.loads(dataset.source)["uri"])
    except (ValueError, KeyError, TypeError):
        source = str(dataset.source)
    return {
        "name": str(dataset.name),
        "digest": str(dataset.digest),
        "context": str(context),
        "source": source,
        "profile": str(dataset.profile or ""),
    }
