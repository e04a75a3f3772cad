"""How a job's run begins: new, gone on with, in another store, or while the store is away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.pipelines.exported_models import ExportedModels
from fewstep.pipelines.rollout_samples import spread_of
from fewstep.pipelines.run_cost import run_cost
from fewstep.pipelines.settings import PretrainConfig
from fewstep.pipelines.tracked_run import RunPlan, read_identity, tracked_run
from fewstep.platform.artifacts import machine_info
from fewstep.platform.errors import ResourceError
from fewstep.platform.mlflow_runs import RunStore
from fewstep.platform.mlflow_store import open_client, sqlite_uri
from fewstep.platform.records import DecodePolicy
from fewstep.platform.tracking import MemoryTracker


def plan(out: Path, uri: str, *, resumed: bool = False, required: bool = True, **changes: object) -> RunPlan:
    config = PretrainConfig.model_validate({"out": out, "steps": 7, **changes})
    return RunPlan(
        kind="pretrain", config=config, out=out, tracking_uri=uri, experiment="begin", description="What it is.",
        resumed=resumed, required=required, tags={"model.family": "block-diffusion"},
    )  # fmt: skip


def test_a_run_begins_with_its_configuration_and_environment(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path)
    with tracked_run(plan(tmp_path / "job", uri)) as tracker:
        assert not tracker.resumed
    client = open_client(uri, create=False)
    run = client.get_run(tracker.run_id)
    assert run.data.params["steps"] == "7"
    assert run.data.params["size.hidden_size"] == "128"
    tags = run.data.tags
    assert tags["model.family"] == "block-diffusion"
    assert tags["mlflow.source.git.dirty"] in ("true", "false")
    assert {
        "machine.cpu",
        "version.torch",
        "version.ray",
        "fewstep.host",
        "mlflow.source.git.commit",
    } <= tags.keys()
    identity = read_identity(tmp_path / "job")
    assert (identity["run_id"], identity["uri"]) == (tracker.run_id, uri)
    assert run.info.run_name == f"pretrain-job-{identity['key'][:6]}"
    environment = Path(client.download_artifacts(tracker.run_id, "environment.txt")).read_text()
    assert "mlflow==3.17.2" in environment.splitlines()


def test_a_job_that_goes_on_goes_on_with_its_run_and_says_what_changed(tmp_path: Path) -> None:
    uri, out = sqlite_uri(tmp_path), tmp_path / "job"
    with tracked_run(plan(out, uri)) as first:
        first.log_metrics({"train/loss": 1.0}, 1)
    with tracked_run(plan(out, uri, resumed=True, steps=9)) as second:
        assert (second.run_id, second.resumed) == (first.run_id, True)
    with tracked_run(plan(out, uri, resumed=False)) as third:
        assert third.run_id != first.run_id, "a fresh start is a fresh run"
    client = open_client(uri, create=False)
    (path,) = (
        item.path for item in client.list_artifacts(first.run_id, "resumed") if item.path.endswith(".diff")
    )
    text = Path(client.download_artifacts(first.run_id, path)).read_text()
    assert "-steps: 7" in text
    assert "+steps: 9" in text
    assert client.get_run(first.run_id).data.params["steps"] == "7"


def test_in_another_store_it_is_another_run(tmp_path: Path) -> None:
    out = tmp_path / "job"
    with tracked_run(plan(out, sqlite_uri(tmp_path / "a"))) as first:
        pass
    with tracked_run(plan(out, sqlite_uri(tmp_path / "b"), resumed=True)) as second:
        assert second.run_id != first.run_id


def test_a_run_that_goes_on_does_not_need_its_store_at_once(tmp_path: Path) -> None:
    uri, out = sqlite_uri(tmp_path / "store"), tmp_path / "job"
    with tracked_run(plan(out, uri)) as first:
        first.log_metrics({"train/loss": 1.0}, 1)
    database, aside = tmp_path / "store" / "mlflow.db", tmp_path / "store" / "aside.db"
    database.rename(aside)
    database.mkdir()  # cannot be opened as a file
    with pytest.raises(ResourceError), tracked_run(plan(tmp_path / "new", uri)):
        pass
    with tracked_run(plan(out, uri, resumed=True)) as second:
        second._patience_s = 0.5
        second.log_metrics({"train/loss": 1.0}, 1)
        second.log_metrics({"train/loss": 0.5}, 2)
    database.rmdir()
    aside.rename(database)
    (run,) = RunStore(uri).runs()
    assert (run.run_id, run.status) == (first.run_id, "FINISHED")
    history = open_client(uri, create=False).get_metric_history(first.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]


def test_checkpoints_are_logged_with_means_since_the_one_before_and_only_the_newest_stay(
    tmp_path: Path,
) -> None:
    model, tokenizer = load_model(embedded_model())
    tracker = MemoryTracker()
    exports = ExportedModels(tmp_path, 2, tracker, model.config, tokenizer, name="tiny", example="def f(")
    history = [
        {"step": float(step), "reward/pass_rate": step / 10, "rollout/forwards_per_answer": 20.0 - step}
        for step in range(1, 7)
    ]
    for step in (2, 4, 6, 6):
        exports.add(model.state_dict(), step, DecodePolicy(threshold=0.5, temperature=0.6), history[:step])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00004", "step_00006"]
    assert [checkpoint.step for checkpoint in tracker.checkpoints] == [2, 4, 6]
    assert tracker.checkpoints[1].metrics == pytest.approx(
        {"checkpoint/pass_rate": 0.35, "checkpoint/forwards_per_answer": 16.5}
    )
    assert tracker.checkpoints[1].policy == DecodePolicy(threshold=0.5)
    assert load_model(tmp_path / "step_00006")[0].config == model.config


def test_the_bill_adds_up() -> None:
    row = {
        "perf/generate_seconds": 2.0, "perf/train_seconds": 1.0, "perf/push_seconds": 0.5, "perf/step_seconds": 4.0,
        "rollout/tokens_per_answer": 30.0, "rollout/forwards_per_answer": 5.0,
    }  # fmt: skip
    bill = run_cost([row, row], rollouts_per_step=10, total_seconds=20.0)
    assert bill["seconds"] == {
        "generate": 4.0, "extract": 0.0, "verify": 0.0, "credit": 0.0, "train": 2.0, "push": 1.0, "other": 1.0,
        "outside": 12.0,
    }  # fmt: skip
    assert sum(bill["seconds"].values()) == 20.0
    assert (bill["num_rollouts"], bill["num_tokens"], bill["num_forwards"]) == (20, 600, 100)
    assert bill["core_seconds"] == 20.0 * int(machine_info()["cores"])
    assert json.dumps(bill)


def test_a_spread_has_its_four_marks() -> None:
    assert spread_of("x", [float(value) for value in range(101)]) == {
        "x_min": 0.0, "x_p50": 50.0, "x_p95": 95.0, "x_max": 100.0
    }  # fmt: skip
