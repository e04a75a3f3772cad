"""Applies spooled entries to an MLflow store, each any number of times with the effect of once.

A process can die between the store's taking an entry and the note that it did, and a request can fail after the server
has acted on it. So every entry carries what makes its repetition recognisable: the run by a key in its tags, metrics
by the time they were logged at, figures by name, step and time, models by a mark, traces by their ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.courier import Refused
from fewstep.platform.errors import ConfigError, ResourceError
from fewstep.platform.mlflow_models import log_by_reference, register, tracked_model
from fewstep.platform.mlflow_store import (
    close_abandoned_runs,
    import_mlflow,
    open_client,
    open_experiment,
    reporting,
    store_error,
)
from fewstep.platform.mlflow_traces import write_trace
from fewstep.platform.spool import Entry, Spool

KEY_TAG, SESSION_TAG = "fewstep.run_key", "fewstep.session_ms"
_RUN_FILE = "run.json"
_PARAMS_PER_CALL = 100
# What a store says of a request that will never do, whenever it is repeated.
_REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
# A server that fails on one request and answers others will not take that one the sixth time either.
_TRIES_OF_A_FAULT = 5
_BAD_DATA = ("IntegrityError", "DataError", "StatementError")


class Delivery:
    """Brings the entries of one spool to one store.

    Args:
        uri: the store; it need not answer yet.
        spool: its folder keeps which MLflow run is meant.
    """

    def __init__(self, uri: str, spool: Spool) -> None:
        self.uri, self._spool = uri, spool
        self._client: Any = None
        self._faults: tuple[int, int] = (-1, 0)  # the entry that failed last, and how often
        self._told_ahead: set[int] = set()  # metrics that went out before their turn
        self.experiment_id = self.run_id = ""
        self.resumed = False
        self.last_steps: dict[str, int] = {}
        self.params: dict[str, str] = {}
        self.closed_runs: list[str] = []
        known = spool.folder / _RUN_FILE
        if known.is_file():
            self.experiment_id, self.run_id = json.loads(known.read_text())

    @property
    def client(self) -> Any:
        """Opened at the first use."""
        if self._client is None:
            self._client = open_client(self.uri, create=True)
        return self._client

    def apply(self, entries: Sequence[Entry]) -> int:
        """Applies the first entry, and with it those behind that can go in the same call; returns how many.

        Raises:
            ResourceError: the store does not answer; the same call may succeed later.
            Refused: the store will never take the first entry; a user's mistake is its cause.
        """
        first = entries[0]
        try:
            if first.kind == "metrics":
                return self._metrics(entries)
            getattr(self, f"_{first.kind}")(first)
            return 1
        except ConfigError as error:
            raise Refused(str(error)) from error
        except ResourceError:
            raise
        except Exception as error:
            raise self._translated(first, error) from error

    def _translated(self, entry: Entry, error: Exception) -> Exception:
        """A failure of the store as ResourceError, anything that a repetition cannot heal as Refused."""
        mlflow = import_mlflow()
        if isinstance(error, mlflow.exceptions.MlflowException):
            bad_data = type(error.__cause__).__name__ in _BAD_DATA
            if error.error_code in _REFUSALS or bad_data or self._is_stuck(entry, error.error_code):
                return Refused(" ".join(str(error).split())[:300])
            return store_error(self.uri, error)
        if isinstance(error, FileNotFoundError):
            return Refused(str(error))
        # requests' and sqlite's failures are OSErrors; sqlalchemy's come wrapped, except while a store is opened.
        if isinstance(error, OSError) or type(error).__module__.startswith("sqlalchemy"):
            return store_error(self.uri, error)
        return Refused(f"{type(error).__name__}: {error}")

    def _is_stuck(self, entry: Entry, code: str) -> bool:
        """Whether the store keeps failing on this very entry although it answers."""
        if code != "INTERNAL_ERROR":  # locked, overloaded or away: its own time will come
            return False
        self._faults = (entry.number, self._faults[1] + 1 if self._faults[0] == entry.number else 1)
        if self._faults[1] < _TRIES_OF_A_FAULT:
            return False
        try:
            with reporting(self.uri):
                self.client.search_experiments(max_results=1)
        except ResourceError:
            return False
        return True

    def _run(self, entry: Entry) -> None:
        """Makes the run, or goes on with the one that has the same key."""
        payload, client = entry.payload, self.client
        self.experiment_id = open_experiment(client, self.uri, payload["experiment"])
        self.closed_runs = close_abandoned_runs(client, self.experiment_id)
        found = client.search_runs(
            [self.experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{payload['key']}'", max_results=1
        )
        tags = {**payload["tags"], KEY_TAG: payload["key"], SESSION_TAG: str(payload["start_ms"])}
        if not found:
            run = client.create_run(
                self.experiment_id, start_time=payload["start_ms"], run_name=payload["name"], tags=tags
            )
            self.run_id = str(run.info.run_id)
        else:
            (run,) = found
            self.run_id, self.resumed = str(run.info.run_id), True
            self.params = dict(run.data.params)
            # The data of a run hold each metric's latest point; the public view of them has no steps.
            self.last_steps = {point.key: int(point.step) for point in run.data._metric_objs}
            if int(run.data.tags.get(SESSION_TAG, "0")) <= payload["start_ms"]:
                self._reopen(run, tags)
        atomic_write_text(self._spool.folder / _RUN_FILE, json.dumps([self.experiment_id, self.run_id]))

    def _reopen(self, run: Any, tags: dict[str, str]) -> None:
        """A later session of the same run takes it over from an earlier one."""
        entities = import_mlflow("mlflow.entities")
        if run.data.tags.get(SESSION_TAG) != tags[SESSION_TAG]:
            times = int(run.data.tags.get("fewstep.resumed", "0")) + 1
            tags = {**tags, "fewstep.resumed": str(times)}
        rows = [entities.RunTag(key, value) for key, value in tags.items()]
        self.client.log_batch(self.run_id, tags=rows)
        self.client.update_run(self.run_id, status="RUNNING")

    def _params(self, entry: Entry) -> None:
        entities = import_mlflow("mlflow.entities")
        # In a run that is gone on with, a parameter keeps its first value; what changed is an artifact.
        rows = [entities.Param(key, value) for key, value in entry.payload.items() if key not in self.params]
        for start in range(0, len(rows), _PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, params=rows[start : start + _PARAMS_PER_CALL])

    def _metrics(self, entries: Sequence[Entry]) -> int:
        """Tells the metrics at the front, and in the same call those that only traces part from them: a step logs both,
        and a call costs as much as ten steps' metrics do. Returns how many entries at the front are told."""
        if entries[0].number not in self._told_ahead:
            near = list(takewhile(lambda entry: entry.kind in ("metrics", "trace"), entries))
            batch = [entry for entry in near if entry.kind == "metrics"]
            try:
                self._log_metrics(batch)
            except Exception as error:
                if len(batch) == 1 or not isinstance(self._translated(entries[0], error), Refused):
                    raise
                # Only one of them may be to blame: each is told by itself, starting with the first.
                batch = batch[:1]
                self._log_metrics(batch)
            self._told_ahead.update(entry.number for entry in batch)
        told = list(takewhile(lambda entry: entry.number in self._told_ahead, entries))
        self._told_ahead.difference_update(entry.number for entry in told)
        return len(told)

    def _log_metrics(self, batch: Sequence[Entry]) -> None:
        entities = import_mlflow("mlflow.entities")
        rows = [
            entities.Metric(key, value, entry.payload["time_ms"], entry.payload["step"])
            for entry in batch
            for key, value in entry.payload["values"].items()
            if self._is_new(key, entry.payload["step"])
        ]
        for start in range(0, len(rows), 1000):
            self.client.log_batch(self.run_id, metrics=rows[start : start + 1000], synchronous=True)

    def _is_new(self, key: str, step: int) -> bool:
        """Steps that a run did before it was interrupted, and does again after its checkpoint, are told once."""
        return key.startswith("system/") or step > self.last_steps.get(key, -1)

    def _tags(self, entry: Entry) -> None:
        entities = import_mlflow("mlflow.entities")
        rows = [entities.RunTag(key, value) for key, value in entry.payload.items()]
        self.client.log_batch(self.run_id, tags=rows)

    def _dataset(self, entry: Entry) -> None:
        entities, payload = import_mlflow("mlflow.entities"), entry.payload
        dataset = entities.Dataset(
            name=payload["name"], digest=payload["digest"], source_type="local",
            source=json.dumps({"uri": payload["source"]}), profile=json.dumps(payload["profile"]),
        )  # fmt: skip
        mark = entities.InputTag("mlflow.data.context", payload["context"])
        self.client.log_inputs(self.run_id, datasets=[entities.DatasetInput(dataset, tags=[mark])])

    def _figure(self, entry: Entry) -> None:
        name, step, time_ms = (entry.payload[key] for key in ("name", "step", "time_ms"))
        path = self._file(entry)
        self.client.log_artifact(self.run_id, str(path), "figures")
        # The file's name ends in a random id: the same figure told twice would be two.
        known = f"images/{name.replace('/', '~')}+step+{step}+timestamp+{time_ms}+"
        if not any(item.path.startswith(known) for item in self.client.list_artifacts(self.run_id, "images")):
            image = import_mlflow().Image(str(path))
            self.client.log_image(
                self.run_id, image, key=name, step=step, timestamp=time_ms, synchronous=True
            )

    def _artifact(self, entry: Entry) -> None:
        path, folder = self._file(entry), entry.payload["folder"]
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), "/".join(filter(None, (folder, path.name))))
        else:
            self.client.log_artifact(self.run_id, str(path), folder or None)

    def _text(self, entry: Entry) -> None:
        self.client.log_text(self.run_id, entry.payload["text"], entry.payload["path"])

    def _table(self, entry: Entry) -> None:
        """A table that the run's page can show; the whole of it every time, so that nothing is appended twice."""
        path, rows = f"{entry.payload['name']}.json", entry.payload["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
        self.client.log_text(self.run_id, json.dumps(table), path)
        shown = json.loads(self.client.get_run(self.run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        if {"path": path, "type": "table"} not in shown:
            shown.append({"path": path, "type": "table"})
            self.client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps(shown))

    def _trace(self, entry: Entry) -> None:
        write_trace(self.client, self.experiment_id, self.run_id, entry.payload)

    def _checkpoint(self, entry: Entry) -> None:
        model = tracked_model(entry.payload["model"], folder=Path(entry.payload["weights"]))
        log_by_reference(
            self.client, self.experiment_id, self.run_id, model, mark=self._mark(entry),
            dataset_digest=entry.payload["dataset_digest"], checksum=entry.payload["checksum"],
        )  # fmt: skip

    def _model(self, entry: Entry) -> None:
        model = tracked_model(entry.payload["model"], folder=self._file(entry))
        register(
            self.client, self.experiment_id, self.run_id, model, mark=self._mark(entry),
            dataset_digest=entry.payload["dataset_digest"],
        )  # fmt: skip

    def _finish(self, entry: Entry) -> None:
        # A run that a later session has taken up is that session's to end.
        session = self.client.get_run(self.run_id).data.tags.get(SESSION_TAG)
        if session == str(entry.payload["start_ms"]):
            self.client.set_terminated(self.run_id, entry.payload["status"], end_time=entry.payload["end_ms"])

    def _file(self, entry: Entry) -> Path:
        return self._spool.files_of(entry.number) / str(entry.payload["file"])

    def _mark(self, entry: Entry) -> str:
        return f"{self._spool.folder.name}/{entry.number}"
