"""Runs in a real sqlite store: what is kept, what a crash leaves, what cannot be opened."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from fewstep.platform import mlflow_store, system_metrics
from fewstep.platform.errors import ConfigError, ResourceError
from fewstep.platform.mlflow_store import import_mlflow, open_client, sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.rollout_trace import RolloutTrace, Span

OPENS_A_RUN = """
import sys, time
from fewstep.platform.mlflow_tracker import MlflowTracker
tracker = MlflowTracker(sys.argv[1], experiment=sys.argv[2], run_name="victim", system_metrics=False)
tracker.log_metrics({"train/loss": 1.0}, step=0)
tracker.flush()
print(tracker.run_id, flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the file: making its tables takes seconds. Tests keep apart by experiment."""
    return sqlite_uri(tmp_path_factory.mktemp("store"))


def run_of(uri: str, run_id: str) -> Any:
    return open_client(uri, create=False).get_run(run_id)


def tracker_of(uri: str, experiment: str, **settings: Any) -> MlflowTracker:
    return MlflowTracker(uri, experiment=experiment, run_name="test", **{"system_metrics": False, **settings})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def artifact_paths(uri: str, run_id: str, folder: str = "") -> list[str]:
    return [item.path for item in open_client(uri, create=False).list_artifacts(run_id, folder or None)]


def test_a_run_keeps_params_metrics_data_and_files(uri: str, tmp_path: Path) -> None:
    from matplotlib.image import imsave

    figure, folder = tmp_path / "frontier.png", tmp_path / "trajectories"
    imsave(figure, [[0.0, 1.0], [1.0, 0.0]])
    folder.mkdir()
    (folder / "step_0.parquet").write_bytes(b"rows")
    with tracker_of(uri, "kept", tags={"story": "demo"}, description="What it is.") as tracker:
        tracker.log_params({"seed": 1, "train": {"lr": 1e-4}})
        for step in range(3):
            tracker.log_metrics({"train/loss": 1.0 / (step + 1), "eval/heldout/pass@1": math.nan}, step=step)
        tracker.log_dataset(
            "held-out", digest="c" * 64, context="evaluation", source="seed 1", profile={"num_tasks": 500}
        )
        tracker.log_figure("frontier", figure, step=2)
        tracker.log_artifact(folder)
        tracker.log_artifact(folder / "step_0.parquet", "samples")
    client, run = open_client(uri, create=False), run_of(uri, tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1", "train.lr": "0.0001"}
    history = client.get_metric_history(tracker.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert math.isnan(run.data.metrics["eval/heldout/pass_at_1"])
    (lineage,) = run.inputs.dataset_inputs
    assert (lineage.dataset.name, lineage.dataset.digest) == ("held-out", "c" * 16)
    assert [(tag.key, tag.value) for tag in lineage.tags] == [("mlflow.data.context", "evaluation")]
    assert run.data.tags["story"] == "demo"
    assert run.data.tags["mlflow.note.content"] == "What it is."
    assert run.data.tags["fewstep.pid"] == str(os.getpid())
    assert artifact_paths(uri, tracker.run_id, "figures") == ["figures/frontier.png"]
    assert artifact_paths(uri, tracker.run_id, "trajectories") == ["trajectories/step_0.parquet"]
    assert artifact_paths(uri, tracker.run_id, "samples") == ["samples/step_0.parquet"]
    assert any("frontier" in path for path in artifact_paths(uri, tracker.run_id, "images"))


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("loss is NaN"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_an_error_sets_the_status_keeps_its_trace_and_goes_on(
    uri: str, error: BaseException, status: str
) -> None:
    tracker = tracker_of(uri, "errors")

    def job() -> None:
        with tracker:
            tracker.log_metrics({"train/loss": 2.0}, step=7)
            raise error

    with pytest.raises(type(error)):
        job()
    run = run_of(uri, tracker.run_id)
    assert run.info.status == status
    assert run.data.metrics == {"train/loss": 2.0}
    assert run.data.tags["fewstep.failure"].startswith(type(error).__name__)
    assert artifact_paths(uri, tracker.run_id) == ["failure.txt"]


def test_logging_a_step_does_not_wait_for_the_store(uri: str) -> None:
    import sqlite3

    with tracker_of(uri, "patience") as tracker:
        database = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
        database.execute("BEGIN EXCLUSIVE")
        start = time.perf_counter()
        for step in range(100):
            tracker.log_metrics({f"train/metric_{index}": 1.0 for index in range(20)}, step=step)
        assert time.perf_counter() - start < 1.0
        database.execute("ROLLBACK")
        database.close()
    assert len(open_client(uri, create=False).get_metric_history(tracker.run_id, "train/metric_0")) == 100


def test_a_param_is_logged_once(uri: str) -> None:
    with tracker_of(uri, "params") as tracker:
        tracker.log_params({"lr": 1, "long": "x" * 7000})
        with pytest.raises(ConfigError, match="lr: got 2"):
            tracker.log_params({"lr": 2})
    params = run_of(uri, tracker.run_id).data.params
    assert params["lr"] == "1"
    assert len(params["long"]) == 6000
    assert params["long"].endswith("(7000 characters, cut)")


def test_the_host_and_other_nodes_are_sampled(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "_INTERVAL_S", 0.2)
    with tracker_of(uri, "system", system_metrics=True) as tracker:
        tracker.watch("node_1", lambda: {"cpu_utilization_percentage": 50.0})
        wait_for(
            lambda: "system/node_1/cpu_utilization_percentage" in run_of(uri, tracker.run_id).data.metrics
        )
    metrics = run_of(uri, tracker.run_id).data.metrics
    assert metrics["system/node_1/cpu_utilization_percentage"] == 50.0
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= metrics.keys()


def test_a_run_killed_outright_is_closed_by_the_next(uri: str) -> None:
    command = [sys.executable, "-c", OPENS_A_RUN, uri, "killed"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        try:
            assert victim.stdout is not None
            run_id = victim.stdout.readline().strip()
            with tracker_of(uri, "killed") as bystander:
                assert bystander.closed_runs == []
                assert run_of(uri, run_id).info.status == "RUNNING"
        finally:
            victim.kill()
    with tracker_of(uri, "killed") as bystander, tracker_of(uri, "killed") as successor:
        assert bystander.closed_runs == [run_id]
        assert successor.closed_runs == []
    run = run_of(uri, run_id)
    assert run.info.status == "KILLED"
    (last,) = open_client(uri, create=False).get_metric_history(run_id, "train/loss")
    assert run.info.end_time == last.timestamp


def test_another_hosts_runs_are_left_alone(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracker_of(uri, "hosts") as tracker:
        tracker.set_tags({mlflow_store.HOST_TAG: "elsewhere", mlflow_store.PID_TAG: "1"})
        tracker.flush()
        with tracker_of(uri, "hosts") as other:
            assert other.closed_runs == []


def test_a_reused_pid_is_not_the_old_process(uri: str) -> None:
    with tracker_of(uri, "reused") as tracker:
        tracker.set_tags({mlflow_store.STARTED_TAG: "1"})
        tracker.flush()
        with tracker_of(uri, "reused") as other:
            assert other.closed_runs == [tracker.run_id]


def test_a_file_that_is_not_there_is_a_mistake(uri: str, tmp_path: Path) -> None:
    with tracker_of(uri, "absent") as tracker, pytest.raises(FileNotFoundError, match=r"absent\.parquet"):
        tracker.log_artifact(tmp_path / "absent.parquet")


def test_what_the_store_refuses_is_reported_at_the_end_and_the_rest_is_there(uri: str) -> None:
    tracker = tracker_of(uri, "refused")
    tracker.log_params({"seed": 1})
    tracker.flush()
    open_client(uri, create=False).log_param(tracker.run_id, "lr", "0.1")
    tracker.log_params({"lr": 0.2})
    tracker.log_metrics({"train/loss": 1.0}, step=0)
    with pytest.raises(ResourceError, match=r"params: .*lr"):
        tracker.finish("FINISHED")
    run = run_of(uri, tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/loss": 1.0})


def test_a_table_and_a_trace_are_shown(uri: str) -> None:
    rows = [{"step": 0, "text": "return 1"}, {"step": 1, "outcome": "passed", "text": "\ud800\0"}]
    start = time.time_ns()
    stages = (
        Span("rollout", start, start + 10**9, attributes={"forwards": 3}),
        Span("sandbox", start + 10**9, start + 2 * 10**9, outputs={"outcome": "wrong_answer"}, failed=True),
    )
    trace = RolloutTrace("def f(", "\ud800", stages, {"step": "4"}, {"passed": False})
    with tracker_of(uri, "shown") as tracker:
        tracker.log_table("samples", rows[:1])
        tracker.log_table("samples", rows)
        tracker.log_trace(trace)
    client = open_client(uri, create=False)
    # As MLflow's own load_table reads it; that one looks in the process's global store.
    table = pandas.read_json(client.download_artifacts(tracker.run_id, "samples.json"), orient="split")
    assert (
        '"samples.json", "type": "table"' in run_of(uri, tracker.run_id).data.tags["mlflow.loggedArtifacts"]
    )
    assert table["text"].tolist() == ["return 1", "\\ud800\\x00"]
    assert table["outcome"].isna().tolist() == [True, False]
    (found,) = client.search_traces([tracker.experiment_id], filter_string="tags.step = '4'")
    assert found.info.trace_id == f"tr-{trace.trace_id}"
    assert found.info.trace_metadata["mlflow.sourceRun"] == tracker.run_id
    assert (str(found.info.state), found.info.execution_duration) == ("ERROR", 2000)
    root, rollout, sandbox = sorted(
        found.data.spans, key=lambda span: ("answer", "rollout", "sandbox").index(span.name)
    )
    assert (root.parent_id, rollout.parent_id, sandbox.parent_id) == (None, root.span_id, root.span_id)
    assert rollout.attributes["forwards"] == 3
    assert sandbox.outputs == {"outcome": "wrong_answer"}
    assert [(item.name, item.value) for item in found.info.assessments] == [("passed", False)]


def test_a_run_is_gone_on_with_by_its_key(uri: str) -> None:
    first = tracker_of(uri, "resumed", key="0123abc")
    first.log_params({"seed": 1, "out": "a"})
    for step in range(4):
        first.log_metrics({"train/loss": float(step), "perf/step_seconds": 1.0}, step=step)
    first.finish("KILLED")
    assert not first.resumed
    second = tracker_of(uri, "resumed", key="0123abc")
    assert (second.run_id, second.resumed) == (first.run_id, True)
    assert run_of(uri, first.run_id).info.status == "RUNNING"
    second.log_params({"seed": 1, "out": "b", "new": 2})
    for step in range(2, 6):  # from the checkpoint of step 2
        second.log_metrics({"train/loss": float(step), "perf/step_seconds": 2.0}, step=step)
    second.finish("FINISHED")
    run = run_of(uri, first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1", "out": "a", "new": "2"}
    assert run.data.tags["fewstep.resumed"] == "1"
    history = open_client(uri, create=False).get_metric_history(first.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, float(step)) for step in range(6)]


def test_a_session_that_was_taken_over_does_not_end_the_run(uri: str) -> None:
    first = tracker_of(uri, "taken", key="77")
    second = tracker_of(uri, "taken", key="77")
    first.finish("FAILED")
    assert run_of(uri, second.run_id).info.status == "RUNNING"
    second.finish("FINISHED")
    assert run_of(uri, second.run_id).info.status == "FINISHED"


def test_a_password_is_in_no_message() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://me:s3cret@127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ResourceError) as refused:
            open_client(address, create=True)
    assert "s3cret" not in str(refused.value)
    assert "me:***@" in str(refused.value)


def test_a_relative_address_means_the_same_store_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with tracker_of("sqlite:///runs/mlflow.db", "relative") as tracker:
        (tmp_path / "note.txt").write_text("kept")
        tracker.log_artifact(tmp_path / "note.txt")
    assert tracker.uri == sqlite_uri(tmp_path / "runs")
    assert (tmp_path / "runs" / "artifacts" / tracker.run_id / "artifacts" / "note.txt").read_text() == "kept"


@pytest.mark.parametrize("address", ["runs/demo", "file:///runs/demo"])
def test_a_folder_store_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="folder store"):
        open_client(address, create=True)


def test_a_store_that_should_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="existing sqlite store"):
        open_client(sqlite_uri(tmp_path), create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_named_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ResourceError, match="running MLflow server"):
            open_client(address, create=True)
    assert time.monotonic() - start < 5


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text(
        "this is not a database, and longer than sqlite's header of 100 bytes " * 4
    )
    with pytest.raises(ResourceError, match="not a database"):
        open_client(sqlite_uri(tmp_path), create=True)


def test_a_deleted_experiment_is_refused(uri: str) -> None:
    with tracker_of(uri, "deleted") as tracker:
        pass
    open_client(uri, create=False).delete_experiment(tracker.experiment_id)
    with pytest.raises(ConfigError, match="restore"):
        tracker_of(uri, "deleted")


def test_telemetry_is_off() -> None:
    import_mlflow()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "true"


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    program = "import sys, fewstep.platform.mlflow_tracker; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
