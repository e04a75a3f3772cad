"""A run in MLflow: a sqlite store by default, a server by address, one writer, and no step that waits for either.

Everything a job logs is an entry of an append-only spool (spool.py) that a thread brings to the store (courier.py,
mlflow_delivery.py). A store that is away, slow or locked therefore costs the run nothing; what it has not taken when
the run ends is delivered by the next job or command that opens it.

Only the client API is used: MLflow's global active run and global tracking address stay as the caller has them.
"""

from __future__ import annotations

import logging
import secrets
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fewstep.platform.artifacts import weights_digest
from fewstep.platform.courier import Courier, Refused
from fewstep.platform.errors import CheckpointError, ResourceError
from fewstep.platform.mlflow_delivery import Delivery
from fewstep.platform.mlflow_leftovers import deliver_leftovers
from fewstep.platform.mlflow_models import model_payload
from fewstep.platform.mlflow_store import absolute_uri, how_to_open, run_page, shown_uri, spool_root
from fewstep.platform.mlflow_traces import plain_json, trace_payload
from fewstep.platform.rollout_trace import RolloutTrace
from fewstep.platform.run_tags import run_tags
from fewstep.platform.spool import Spool
from fewstep.platform.system_metrics import SYSTEM_CLOCK, HostSampler, SystemMetrics
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

_MAX_PARAM_CHARACTERS = 6000
# MLflow takes 36 and prints all of them beside the name; 16 hexadecimal digits still tell data sets apart.
_DIGEST_CHARACTERS = 16
PATIENCE_S = 20.0
"""How long the end of a run waits for a store that takes nothing."""


class MlflowTracker:
    """One MLflow run, open from construction to `finish`.

    Args:
        uri: `sqlite_uri(folder)` or the address of a server or database.
        experiment: made when missing. Runs of it that a killed process of this host left open are closed.
        run_name: what the run is called in lists.
        tags: added to commit, machine, versions, host and process, which are always there.
        description: Markdown, shown at the top of the run's page.
        system_metrics: sample processor, memory, disk, network and GPUs of this host every 10 s.
        key: the run's own name for itself. A run of this key in the experiment is gone on with; "" = a new run.
        required: a store that does not answer now is an error; False = start all the same and deliver later.
        patience_s: how long `finish` and `register_model` wait for a store that takes nothing.
    Raises:
        ConfigError: an address or experiment that cannot be used.
        ResourceError: a required store does not answer.
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
        key: str = "",
        required: bool = True,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.uri = uri = absolute_uri(uri)
        self.key = key or secrets.token_hex(16)
        self._started_ms = _now_ms()
        self._patience_s = patience_s
        self._params: dict[str, str] = {}
        self._datasets: dict[str, str] = {}
        self._lost: list[str] = []
        self._told: set[str] = set()  # refusals that the job knows of
        self._finished = False
        root = spool_root(uri)
        self._spool = Spool(root / f"{self.key[:12]}-{self._started_ms}")
        self._delivery = Delivery(uri, self._spool)
        self._append(
            "run",
            {
                "experiment": experiment, "name": run_name, "key": self.key, "start_ms": self._started_ms,
                "tags": run_tags(description) | dict(tags or {}),
            },
        )  # fmt: skip
        self.closed_runs: list[str] = []
        self._connect(root, required)
        connected = bool(self._delivery.run_id)
        self.run_id: str = self._delivery.run_id or self.key
        self.experiment_id = self._delivery.experiment_id
        self.resumed = self._delivery.resumed if connected else bool(key)
        self._courier = Courier(self._spool, self._delivery)
        first = self._delivery.last_steps.get(SYSTEM_CLOCK, -1) + 1
        self._monitor = SystemMetrics(self.log_metrics, HostSampler(), first) if system_metrics else None

    def _connect(self, root: Path, required: bool) -> None:
        """Makes the run now if the store answers; whatever older runs still have to tell it goes first."""
        try:
            deliver_leftovers(self.uri, root)
            (first,) = self._spool.pending(1)
            self._delivery.apply([first])
            self._spool.acknowledge(first)
            self.closed_runs = self._delivery.closed_runs
        except ResourceError as error:
            if required:
                self._discard()
                raise
            _logger.warning(
                "the run starts without its store; records wait in %s: %s", self._spool.folder, error
            )
        except Refused as refusal:
            self._discard()
            raise refusal.__cause__ or refusal from None

    def _discard(self) -> None:
        """Nothing of this run shall come later."""
        self._spool.acknowledge(next(self._spool.pending(1)))
        self._spool.close()

    @property
    def page(self) -> str:
        """The part of the run's address that follows the server's."""
        return run_page(self.experiment_id, self.run_id)

    @property
    def how_to_open(self) -> str:
        """The command that shows this store in a browser."""
        return how_to_open(self.uri)

    @property
    def num_waiting(self) -> int:
        """Records that the store has not taken yet."""
        return self._spool.num_pending

    def watch(self, name: str, sample: Callable[[], Mapping[str, float]]) -> None:
        """Adds another node to the system metrics: `sample` is called every 10 s, its numbers go to `system/NAME/*`."""
        if self._monitor is not None:
            self._monitor.add(name, sample)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested mappings become dotted keys; a value past MLflow's 6000 characters is cut and says so.

        Raises:
            ConfigError: this process has given another value for a key already.
        """
        flat = {key: _cut(value) for key, value in flatten_params(params).items()}
        if self.resumed:
            flat = {key: value for key, value in flat.items() if key not in self._delivery.params}
        refuse_repeated(flat, self._params)
        new = {key: value for key, value in flat.items() if key not in self._params}
        if new:
            self._append("params", new)
        self._params.update(new)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Spooled; sent in batches about every other second."""
        values = {metric_key(key): float(value) for key, value in metrics.items()}
        self._append("metrics", {"values": values, "step": int(step), "time_ms": _now_ms()})

    def log_dataset(
        self,
        name: str,
        *,
        digest: str,
        context: DatasetContext,
        source: str,
        profile: Mapping[str, int] | None = None,
    ) -> None:
        """Records a data set as an input of the run. The first 16 characters of the digest are kept."""
        short = digest[:_DIGEST_CHARACTERS]
        self._append(
            "dataset",
            {
                "name": name,
                "digest": short,
                "context": context,
                "source": source,
                "profile": dict(profile or {}),
            },
        )
        self._datasets[name] = short

    def log_figure(self, name: str, path: Path, step: int = 0) -> None:
        """Shown among the charts of the run, and kept as a file under `figures/`. Raises FileNotFoundError."""
        payload = {"name": name, "step": step, "time_ms": _now_ms(), "file": Path(path).name}
        self._append("figure", payload, Path(path))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copies a file or a folder. Raises FileNotFoundError."""
        self._append("artifact", {"file": Path(path).name, "folder": folder}, Path(path))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Kept as NAME.json, whole."""
        self._append("table", {"name": name, "rows": plain_json([dict(row) for row in rows])})

    def log_trace(self, trace: RolloutTrace) -> None:
        self._append("trace", trace_payload(trace))

    def log_checkpoint(self, model: TrackedModel) -> None:
        """Raises CheckpointError when the folder has no weights."""
        payload = {"weights": str(model.folder.resolve()), "checksum": weights_digest(model.folder)}
        self._append("checkpoint", {**payload, **self._model_payload(model)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tags", {key: str(value) for key, value in tags.items()})

    def register_model(self, model: TrackedModel) -> str:
        """Logs the folder as a pyfunc of this run, registers it and moves the alias to it.

        Returns:
            `models:/NAME@ALIAS`; the folder, when the store has not taken the model for `patience_s`: it is registered
            as soon as the store is back.
        Raises:
            CheckpointError: the folder has no weights.
            ResourceError: the store refused the model.
        """
        if not any(model.folder.glob("*.safetensors")):
            raise CheckpointError(str(model.folder), "no weights", "a model folder", "write the model first")
        refused = len(self._spool.refused())
        self._append("model", {"file": model.folder.name, **self._model_payload(model)}, model.folder)
        if not self._courier.flush(self._patience_s):
            _logger.warning(
                "the tracking store did not take %s in time; it is registered when it is back", model.name
            )
            return str(model.folder)
        if reasons := self._spool.refused()[refused:]:
            self._told.update(reasons)
            raise ResourceError(
                "model registry", reasons[-1], "a model that can be registered", "see the cause"
            )
        return model.uri

    def flush(self) -> bool:
        """Waits until the store has everything; False when it took nothing for `patience_s`."""
        return self._courier.flush(self._patience_s)

    def finish(self, status: RunStatus) -> None:
        """Closes the run with `status` and delivers what is left; a second call does nothing.

        A store that takes nothing for `patience_s` is left alone: the rest stays in the spool.

        Raises:
            ResourceError: the store refused something for good; the run holds everything else.
        """
        if self._finished:
            return
        self._finished = True
        if self._monitor is not None:
            self._monitor.close()
        self._append("finish", {"status": status, "end_ms": _now_ms(), "start_ms": self._started_ms})
        if not self._courier.close(self._patience_s):
            _logger.warning(
                "%d records of this run wait in %s for %s; the next fewstep command that opens that store delivers them",
                self._spool.num_pending, self._spool.folder, shown_uri(self.uri),
            )  # fmt: skip
        lost = [*self._lost, *(reason for reason in self._spool.refused() if reason not in self._told)]
        self._spool.close()
        if lost:
            raise ResourceError(
                "tracking store", f"{shown_uri(self.uri)} did not take: {'; '.join(lost)}", "a store that takes every write",
                "check free space and the store's log; the files are still in the run's own folder",
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
            self._append("text", {"text": "".join(traceback.format_exception(error)), "path": "failure.txt"})
            self.set_tags({"fewstep.failure": f"{type(error).__name__}: {error}"[:500]})
            self.finish(status)
        except ResourceError as failure:
            error.add_note(f"the tracking store failed as well: {failure}")

    def _model_payload(self, model: TrackedModel) -> dict[str, Any]:
        digest = self._datasets.get(model.dataset, "")
        if model.dataset and not digest:
            raise ValueError(
                f"no data set {model.dataset!r} was logged in this run; there are {sorted(self._datasets)}"
            )
        return {"model": model_payload(model), "dataset_digest": digest}

    def _append(self, kind: str, payload: dict[str, Any], *files: Path) -> None:
        if self._finished and kind != "finish":
            raise RuntimeError("the run is finished; nothing more can be logged")
        try:
            self._spool.append(kind, payload, files)
        except FileNotFoundError:
            raise
        except OSError as error:  # a full disk: the run itself may still go on
            _logger.warning("a record of kind %s was lost: %s", kind, error)
            self._lost.append(f"{kind} ({error})")


def _now_ms() -> int:
    return int(time.time() * 1000)


def _cut(value: str) -> str:
    if len(value) <= _MAX_PARAM_CHARACTERS:
        return value
    note = f"... ({len(value)} characters, cut)"
    return value[: _MAX_PARAM_CHARACTERS - len(note)] + note
