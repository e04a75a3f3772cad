"""A run in MLflow: a sqlite store by default, a server by address, one writer.

Only the client API is used: MLflow's global active run and global tracking address stay as the caller has them.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fewstep.platform.artifacts import machine_info
from fewstep.platform.errors import ResourceError
from fewstep.platform.metric_writer import MetricPoint, MetricWriter
from fewstep.platform.mlflow_registry import register
from fewstep.platform.mlflow_store import (
    absolute_uri,
    close_abandoned_runs,
    how_to_open,
    import_mlflow,
    open_client,
    open_experiment,
    process_tags,
    reporting,
    run_page,
    source_tags,
)
from fewstep.platform.tracking import (
    DatasetContext,
    RunStatus,
    TrackedModel,
    flatten_params,
    metric_key,
    refuse_repeated,
    status_of,
)

_logger = logging.getLogger(__name__)

_PARAMS_PER_CALL = 100
_MAX_PARAM_CHARACTERS = 6000
# MLflow takes 36 and prints all of them beside the name; 16 hexadecimal digits still tell data sets apart.
_DIGEST_CHARACTERS = 16
_SYSTEM_INTERVAL_S = 10.0
_VERSIONS_SHOWN = ("torch", "ray", "deepspeed", "mlflow")


class MlflowTracker:
    """One MLflow run, open from construction to `finish`.

    Args:
        uri: `sqlite_uri(folder)` or the address of a server or database.
        experiment: made when missing. Runs of it that a killed process of this host left open are closed.
        run_name: what the run is called in lists.
        tags: added to commit, machine, versions, host and process, which are always there.
        description: Markdown, shown at the top of the run's page.
        system_metrics: sample processor, memory, disk and network of this host every 10 s.
    Raises:
        ConfigError: an address or experiment that cannot be used.
        ResourceError: a store that does not answer.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str] | None = None,
        description: str = "",
        system_metrics: bool = True,
    ) -> None:
        self.uri = uri = absolute_uri(uri)
        self._client = open_client(uri, create=True)
        self._params: dict[str, str] = {}
        self._datasets: dict[str, str] = {}
        self._lost: list[str] = []
        self._finished = False
        with reporting(uri):
            self.experiment_id = open_experiment(self._client, uri, experiment)
            self.closed_runs = close_abandoned_runs(self._client, self.experiment_id)
            run = self._client.create_run(
                self.experiment_id, run_name=run_name, tags={**_run_tags(description), **(tags or {})}
            )
        self.run_id: str = run.info.run_id
        self._writer = MetricWriter(self._write_points)
        self._monitor = _start_system_metrics(uri, self.run_id) if system_metrics else None

    @property
    def page(self) -> str:
        """The part of the run's address that follows the server's."""
        return run_page(self.experiment_id, self.run_id)

    @property
    def how_to_open(self) -> str:
        """The command that shows this store in a browser."""
        return how_to_open(self.uri)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested mappings become dotted keys; a value past MLflow's 6000 characters is cut and says so.

        Raises:
            ConfigError: the run has another value under a key already.
            ResourceError: the store failed.
        """
        flat = flatten_params(params)
        refuse_repeated(flat, self._params)
        entities = import_mlflow("mlflow.entities")
        rows = [entities.Param(key, _cut(value)) for key, value in flat.items() if key not in self._params]
        with reporting(self.uri):
            for start in range(0, len(rows), _PARAMS_PER_CALL):
                self._client.log_batch(self.run_id, params=rows[start : start + _PARAMS_PER_CALL])
        self._params.update(flat)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queued; a thread writes batches about once a second. A store that fails is tried again until `finish`."""
        now = int(time.time() * 1000)
        self._writer.add(
            [MetricPoint(metric_key(key), float(value), int(step), now) for key, value in metrics.items()]
        )

    def log_dataset(
        self,
        name: str,
        *,
        digest: str,
        context: DatasetContext,
        source: str,
        profile: Mapping[str, int] | None = None,
    ) -> None:
        """Records a data set as an input of the run. The first 16 characters of the digest are kept.

        Raises:
            ResourceError: the store failed.
        """
        entities = import_mlflow("mlflow.entities")
        dataset = entities.Dataset(
            name=name,
            digest=digest[:_DIGEST_CHARACTERS],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(dict(profile or {})),
        )
        mark = entities.InputTag("mlflow.data.context", context)
        with reporting(self.uri):
            self._client.log_inputs(self.run_id, datasets=[entities.DatasetInput(dataset, tags=[mark])])
        self._datasets[name] = dataset.digest

    def log_figure(self, name: str, path: Path, step: int = 0) -> None:
        """Shown among the charts of the run, and kept as a file under `figures/`."""
        image = import_mlflow().Image(str(path))

        def upload() -> None:
            self._client.log_image(self.run_id, image, key=name, step=step, synchronous=True)
            self._client.log_artifact(self.run_id, str(path), "figures")

        self._upload(f"figure {name}", upload)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copies a file or a folder. A store that fails is reported by `finish`, so that a step goes on."""
        path = Path(path)

        def upload() -> None:
            if path.is_dir():
                self._client.log_artifacts(
                    self.run_id, str(path), "/".join(filter(None, (folder, path.name)))
                )
            else:
                self._client.log_artifact(self.run_id, str(path), folder or None)

        self._upload(str(path), upload)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Raises ResourceError when the store fails."""
        entities = import_mlflow("mlflow.entities")
        with reporting(self.uri):
            self._client.log_batch(
                self.run_id, tags=[entities.RunTag(key, str(value)) for key, value in tags.items()]
            )

    def register_model(self, model: TrackedModel) -> str:
        """Logs the folder as a pyfunc of this run, registers it and moves the alias to it; returns its uri.

        Raises:
            CheckpointError: the folder is not there.
            ResourceError: the store failed; the logged model is then marked FAILED.
        """
        digest = self._datasets.get(model.dataset, "")
        if model.dataset and not digest:
            raise ValueError(
                f"no data set {model.dataset!r} was logged in this run; there are {sorted(self._datasets)}"
            )
        return register(self._client, self.uri, self.experiment_id, self.run_id, model, dataset_digest=digest)

    def finish(self, status: RunStatus) -> None:
        """Writes what is queued and closes the run with `status`; a second call does nothing.

        Raises:
            ResourceError: something could not be written; the run then holds everything else.
        """
        if self._finished:
            return
        self._finished = True
        if self._monitor is not None:
            self._monitor.finish()
        unwritten, cause = self._writer.close()
        if unwritten:
            self._lost.append(f"{unwritten} metric points ({cause})")
        with reporting(self.uri):
            self._client.set_terminated(self.run_id, status)
        if self._lost:
            raise ResourceError(
                "tracking store", f"{self.uri} did not take: {'; '.join(self._lost)}", "a store that takes every write",
                "check free space and the server's log; the files are still in the run's own folder",
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = status_of(error)
        if error is None or status == "FINISHED":
            self.finish(status)
            return
        # The error that ended the run is the one to show; a tracker that fails now must not replace it.
        try:
            self._keep_failure(error)
            self.finish(status)
        except ResourceError as failure:
            error.add_note(f"the tracking store failed as well: {failure}")

    def _keep_failure(self, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        with reporting(self.uri):
            self._client.log_text(self.run_id, text, "failure.txt")
            self._client.set_tag(self.run_id, "fewstep.failure", f"{type(error).__name__}: {error}"[:500])

    def _write_points(self, points: Sequence[MetricPoint]) -> None:
        entities = import_mlflow("mlflow.entities")
        rows = [entities.Metric(point.key, point.value, point.timestamp_ms, point.step) for point in points]
        with reporting(self.uri):
            self._client.log_batch(self.run_id, metrics=rows, synchronous=True)

    def _upload(self, what: str, upload: Callable[[], None]) -> None:
        try:
            with reporting(self.uri):
                upload()
        except ResourceError as error:
            _logger.warning("%s was not kept, the tracking store failed: %s", what, error)
            self._lost.append(f"{what} ({error})")


def _start_system_metrics(uri: str, run_id: str) -> Any:
    module = import_mlflow("mlflow.system_metrics.system_metrics_monitor")
    try:
        monitor = module.SystemMetricsMonitor(run_id, sampling_interval=_SYSTEM_INTERVAL_S, tracking_uri=uri)
    except ImportError as error:
        _logger.info("system metrics are off: %s", error)
        return None
    monitor.start()
    return monitor


def _run_tags(description: str) -> dict[str, str]:
    machine = {f"machine.{key}": str(value) for key, value in machine_info().items()}
    return {
        "mlflow.note.content": description,
        **source_tags(),
        **machine,
        **{f"version.{name}": _version(name) for name in _VERSIONS_SHOWN},
        **process_tags(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cut(value: str) -> str:
    if len(value) <= _MAX_PARAM_CHARACTERS:
        return value
    note = f"... ({len(value)} characters, cut)"
    return value[: _MAX_PARAM_CHARACTERS - len(note)] + note
