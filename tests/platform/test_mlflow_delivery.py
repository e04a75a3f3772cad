"""What is told twice is there once; what fails is told apart from what will never do."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from fewstep.kernels.model.checkpoint import embedded_model
from fewstep.pipelines.publish import PYFUNC_SCRIPT
from fewstep.platform.artifacts import file_digest
from fewstep.platform.courier import Refused, deliver
from fewstep.platform.errors import ResourceError
from fewstep.platform.mlflow_delivery import KEY_TAG, Delivery
from fewstep.platform.mlflow_leftovers import deliver_leftovers
from fewstep.platform.mlflow_models import model_payload
from fewstep.platform.mlflow_store import import_mlflow, open_client, spool_root, sqlite_uri
from fewstep.platform.mlflow_traces import trace_payload
from fewstep.platform.records import DecodePolicy
from fewstep.platform.rollout_trace import RolloutTrace, Span
from fewstep.platform.spool import Entry, Spool
from fewstep.platform.tracking import TrackedModel

START_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sqlite_uri(tmp_path_factory.mktemp("store"))


def fill(spool: Spool, folder: Path, key: str) -> None:
    """One entry of every kind, in the order a run makes them."""
    from matplotlib.image import imsave

    imsave(folder / "frontier.png", [[0.0, 1.0], [1.0, 0.0]])
    shutil.copytree(embedded_model(), folder / "model", dirs_exist_ok=True)
    spool.append(
        "run", {"experiment": key, "name": "all", "key": key, "start_ms": START_MS, "tags": {"a": "b"}}
    )
    spool.append("params", {"seed": "1"})
    for step in range(3):
        values = {"train/loss": 1.0 / (step + 1), "train/nan": float("nan")}
        spool.append("metrics", {"values": values, "step": step, "time_ms": START_MS + step})
    data = {
        "name": "held-out",
        "digest": "d" * 16,
        "context": "evaluation",
        "source": "seed 1",
        "profile": {},
    }
    spool.append("dataset", data)
    figure = {"name": "frontier", "step": 2, "time_ms": START_MS + 9, "file": "frontier.png"}
    spool.append("figure", figure, (folder / "frontier.png",))
    spool.append("artifact", {"file": "model", "folder": "kept"}, (folder / "model",))
    spool.append("text", {"text": "why", "path": "failure.txt"})
    spool.append("table", {"name": "samples", "rows": [{"step": 1}, {"step": 2}]})
    now = time.time_ns()
    trace = RolloutTrace("p", "c", (Span("rollout", now, now + 5),), {"step": "1"}, {"passed": True})
    spool.append("trace", trace_payload(trace))
    spool.append("tags", {"mood": "good"})
    models = [
        TrackedModel(
            folder=folder / "model", name=key, alias=alias, metrics={metric: 0.5}, input_example="def f(",
            code=PYFUNC_SCRIPT, policy=DecodePolicy(), max_tokens=8, step=3, dataset="held-out",
        )
        for alias, metric in (("", "checkpoint/pass_rate"), ("candidate", "eval/heldout/pass_at_1"))
    ]  # fmt: skip
    reference = {
        "weights": str(folder / "model"),
        "checksum": file_digest(folder / "model" / "model.safetensors"),
    }
    spool.append("checkpoint", {**reference, "model": model_payload(models[0]), "dataset_digest": "d" * 16})
    payload = {"file": "model", "model": model_payload(models[1]), "dataset_digest": "d" * 16}
    spool.append("model", payload, (folder / "model",))
    spool.append("finish", {"status": "FINISHED", "end_ms": START_MS + 99, "start_ms": START_MS})


def state(uri: str, key: str) -> dict[str, Any]:
    """Everything the store has of a run, counted."""
    client = open_client(uri, create=False)
    experiment = client.get_experiment_by_name(key).experiment_id
    runs = client.search_runs([experiment])
    run = client.get_run(runs[0].info.run_id)

    def paths(folder: str | None = None) -> list[str]:
        found = client.list_artifacts(run.info.run_id, folder)
        return sorted(p for item in found for p in (paths(item.path) if item.is_dir else [item.path]))

    return {
        "runs": len(runs),
        "info": (run.info.status, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": run.data.tags,
        "history": {
            name: [
                (p.step, p.timestamp, str(p.value)) for p in client.get_metric_history(run.info.run_id, name)
            ]
            for name in run.data.metrics
        },
        "inputs": [item.dataset.digest for item in run.inputs.dataset_inputs],
        "outputs": sorted((item.model_id, item.step) for item in run.outputs.model_outputs),
        "artifacts": paths(),
        "traces": [
            (t.info.trace_id, len(t.data.spans), len(t.info.assessments))
            for t in client.search_traces([experiment])
        ],
        "models": sorted(
            (m.model_id, str(m.status), [(x.key, x.value) for x in m.metrics])
            for m in client.search_logged_models([experiment])
        ),
        "versions": [(v.version, dict(v.tags)) for v in client.search_model_versions(f"name = '{key}'")],
        "aliases": client.get_registered_model(key).aliases,
    }


class Repeating(Delivery):
    """Applies each call twice, as if the note that the first had worked was lost."""

    def apply(self, entries: Any) -> int:
        super().apply(entries)
        return super().apply(entries)


def test_told_twice_is_there_once(uri: str, tmp_path: Path) -> None:
    check_told_twice(uri, tmp_path)


@pytest.mark.timeout(600)
def test_told_twice_is_there_once_on_a_server(database_server: str, tmp_path: Path) -> None:
    check_told_twice(database_server, tmp_path)


def check_told_twice(uri: str, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    seen = []
    for key, own in (("once", Delivery), ("twice", Repeating)):
        spool = Spool(tmp_path / f"spool-{key}")
        fill(spool, tmp_path / key, key)
        deliver(spool, own(uri, spool))
        assert spool.refused() == []
        spool.close()
        seen.append(state(uri, key))
    once, twice = seen
    assert twice["runs"] == 1
    assert twice["info"] == ("FINISHED", START_MS, START_MS + 99)
    assert twice["history"]["train/loss"] == once["history"]["train/loss"]
    assert len(twice["history"]["train/nan"]) == 3
    for what in ("params", "inputs", "aliases", "info"):
        assert twice[what] == once[what]
    for what in ("artifacts", "traces", "models", "versions", "outputs", "tags"):
        assert len(twice[what]) == len(once[what]), what
    assert [trace[1:] for trace in twice["traces"]] == [(2, 1)]
    assert [model[1] for model in twice["models"]] == ["READY", "READY"]
    assert sum(path.startswith("images/") for path in twice["artifacts"]) == 2  # the figure and its thumbnail


def test_a_run_that_dies_between_taking_and_noting_is_delivered_once(uri: str, tmp_path: Path) -> None:
    """Delivery stops after every single entry in turn, its note lost, and a new process takes over."""
    spool = Spool(tmp_path / "spool")
    fill(spool, tmp_path, "dies")
    while spool.num_pending:
        entries = list(spool.pending())
        Delivery(uri, spool).apply(entries)  # this process dies before it can note anything
        survivor = Delivery(uri, spool)
        spool.acknowledge(entries[survivor.apply(entries) - 1])
    assert spool.refused() == []
    spool.close()
    found = state(uri, "dies")
    assert (found["runs"], len(found["models"]), len(found["versions"])) == (1, 2, 1)
    assert found["info"] == ("FINISHED", START_MS, START_MS + 99)
    assert [point[0] for point in found["history"]["train/loss"]] == [0, 1, 2]


def test_leftovers_are_delivered_to_a_store_that_never_heard_of_the_run(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path / "later")
    spool = Spool(spool_root(uri) / "run")
    (tmp_path / "files").mkdir()
    fill(spool, tmp_path / "files", "unheard")
    number = spool.num_pending
    spool.close()
    shutil.rmtree(tmp_path / "files")  # the run's own folder is gone by now
    assert deliver_leftovers(uri) == number
    assert deliver_leftovers(uri) == 0
    client = open_client(uri, create=False)
    experiment = client.get_experiment_by_name("unheard").experiment_id
    (run,) = client.search_runs([experiment], filter_string=f"tags.`{KEY_TAG}` = 'unheard'")
    assert (run.info.status, run.info.start_time) == ("FINISHED", START_MS)


def entry(kind: str, payload: dict[str, Any]) -> Entry:
    return Entry(0, kind, payload, 0)


def test_a_store_that_answers_no_is_told_apart_from_one_that_does_not_answer(
    uri: str, tmp_path: Path
) -> None:
    spool = Spool(tmp_path / "spool")
    delivery = Delivery(uri, spool)
    run = {"experiment": "apart", "name": "n", "key": "apart", "start_ms": START_MS, "tags": {}}
    delivery.apply([entry("run", run)])
    delivery.apply([entry("params", {"lr": "1"})])
    with pytest.raises(Refused, match="lr"):
        delivery.apply([entry("params", {"lr": "2"})])
    delivery.client.delete_run(delivery.run_id)
    with pytest.raises(Refused, match="active"):
        delivery.apply([entry("tags", {"a": "b"})])
    away = Delivery("http://127.0.0.1:9", spool)
    with pytest.raises(ResourceError, match="running MLflow server"):
        away.apply([entry("tags", {"a": "b"})])
    spool.close()


def test_a_store_that_keeps_failing_on_one_entry_gets_the_next(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path / "spool")
    delivery = Delivery(uri, spool)
    run = {"experiment": "stuck", "name": "n", "key": "stuck", "start_ms": START_MS, "tags": {}}
    delivery.apply([entry("run", run)])
    exceptions = import_mlflow("mlflow.exceptions")

    def fault(*_: Any, **__: Any) -> None:
        raise exceptions.MlflowException("a bug of the server", error_code=1)  # INTERNAL_ERROR

    monkeypatch.setattr(delivery.client, "log_text", fault)
    poison = entry("text", {"text": "t", "path": "p"})
    for _ in range(4):
        with pytest.raises(ResourceError):
            delivery.apply([poison])
    with pytest.raises(Refused, match="a bug of the server"):
        delivery.apply([poison])
    assert delivery.apply([entry("tags", {"a": "b"})]) == 1
    spool.close()


def test_metrics_pass_the_traces_between_them_and_are_told_once(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path / "spool")
    run = {"experiment": "passing", "name": "n", "key": "passing", "start_ms": START_MS, "tags": {}}
    spool.append("run", run)
    now = time.time_ns()
    for step in range(4):
        trace = RolloutTrace("p", "c", (Span("rollout", now, now + 5),), {"step": str(step)})
        spool.append("trace", trace_payload(trace))
        spool.append("metrics", {"values": {"a": step}, "step": step, "time_ms": START_MS + step})
    spool.append("tags", {"late": "yes"})
    spool.append("metrics", {"values": {"a": 4}, "step": 4, "time_ms": START_MS + 4})
    delivery = Delivery(uri, spool)
    calls: list[int] = []
    log_batch = delivery.client.log_batch

    def counted(run_id: str, metrics: Any = (), **rest: Any) -> None:
        calls.append(len(metrics))
        log_batch(run_id, metrics=metrics, **rest)

    monkeypatch.setattr(delivery.client, "log_batch", counted)
    assert deliver(spool, delivery) == 11
    assert calls == [4, 0, 1]  # what stands behind another kind of entry waits for it
    history = delivery.client.get_metric_history(delivery.run_id, "a")
    assert [(point.step, point.value) for point in history] == [(step, step) for step in range(5)]
    assert len(delivery.client.search_traces([delivery.experiment_id])) == 4
    spool.close()


def test_one_bad_entry_takes_no_other_metrics_with_it(uri: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.append("run", {"experiment": "bad", "name": "n", "key": "bad", "start_ms": START_MS, "tags": {}})
    for step, name in enumerate(["a", "b", "no/../way", "c", "d"]):
        spool.append("metrics", {"values": {name: 1.0}, "step": step, "time_ms": START_MS + step})
    delivery = Delivery(uri, spool)
    deliver(spool, delivery)
    assert len(spool.refused()) == 1
    assert "way" in spool.refused()[0]
    assert set(delivery.client.get_run(delivery.run_id).data.metrics) == {"a", "b", "c", "d"}
    spool.close()
