"""The tracking store is killed, locked, slow or away for the whole run: the run goes on, and nothing is lost or doubled."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from tests.tracking_server import TrackingServer

from fewstep.platform.errors import ResourceError
from fewstep.platform.mlflow_leftovers import deliver_leftovers
from fewstep.platform.mlflow_runs import RunStore
from fewstep.platform.mlflow_store import open_client, spool_root, sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.timeout(900)

STEPS = 30
LOGS_UNTIL_KILLED = """
import sys, time
from fewstep.platform.mlflow_tracker import MlflowTracker
tracker = MlflowTracker(sys.argv[1], experiment="killed", run_name="victim", system_metrics=False)
print(tracker.run_id, flush=True)
sys.stdin.readline()  # until the store is gone
for step in range(30):
    tracker.log_metrics({"train/loss": float(step)}, step)
print("logged", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """One server for the file, because a start takes long; tests keep apart by experiment."""
    server = TrackingServer(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(shared: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> TrackingServer:
    monkeypatch.chdir(shared.folder)  # spools of a server's runs are kept under ./runs
    if not shared.running:
        shared.start()
    return shared


def tracker_of(uri: str, experiment: str, **settings: Any) -> MlflowTracker:
    return MlflowTracker(
        uri,
        experiment=experiment,
        run_name="outage",
        **{"system_metrics": False, "patience_s": 5.0, **settings},
    )


def log_steps(tracker: MlflowTracker, steps: range) -> float:
    """Seconds that logging took."""
    started = time.perf_counter()
    for step in steps:
        tracker.log_metrics({"train/loss": float(step), "reward/mean": step / 2}, step)
    return time.perf_counter() - started


def history(uri: str, run_id: str, key: str = "train/loss") -> list[tuple[int, float]]:
    points = open_client(uri, create=False).get_metric_history(run_id, key)
    return [(point.step, point.value) for point in points]


WHOLE = [(step, float(step)) for step in range(STEPS)]


def test_a_server_killed_in_the_middle_gets_everything_when_it_is_back(
    server: TrackingServer, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    report.write_text("{}")
    tracker = tracker_of(server.url, "middle")
    tracker.log_params({"seed": 1})
    log_steps(tracker, range(10))
    assert tracker.flush()
    server.kill()
    assert log_steps(tracker, range(10, 20)) < 2.0, "logging waited for a dead server"
    tracker.log_artifact(report)
    tracker.set_tags({"mood": "calm"})
    assert not tracker.flush()
    server.start()
    log_steps(tracker, range(20, STEPS))
    tracker.finish("FINISHED")
    assert history(server.url, tracker.run_id) == WHOLE
    run = open_client(server.url, create=False).get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["mood"], run.data.params) == ("FINISHED", "calm", {"seed": "1"})
    assert not list(spool_root(server.url).glob("*"))


def test_an_outage_to_the_end_is_made_up_for_by_the_next_command(server: TrackingServer) -> None:
    tracker = tracker_of(server.url, "end", patience_s=2.0)
    log_steps(tracker, range(5))
    tracker.flush()
    server.kill()
    log_steps(tracker, range(5, STEPS))
    started = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - started < 60
    ended_ms = int(time.time() * 1000)
    assert tracker.num_waiting > STEPS - 5
    server.start()
    time.sleep(2)
    (run,) = RunStore(server.url).runs("end")
    assert (run.run_id, run.status) == (tracker.run_id, "FINISHED")
    assert run.end_ms is not None
    assert run.end_ms <= ended_ms, "the end is when the run ended, not when its records arrived"
    assert history(server.url, tracker.run_id) == WHOLE
    assert deliver_leftovers(server.url) == 0


def test_a_store_that_was_never_there_has_the_run_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server = TrackingServer(tmp_path / "server", start=False)
    with pytest.raises(ResourceError, match="running MLflow server"):
        tracker_of(server.url, "never")
    assert not list(spool_root(server.url).glob("*")), "a refused start left something behind"
    started_ms = int(time.time() * 1000)
    with tracker_of(server.url, "never", required=False, patience_s=1.0) as tracker:
        tracker.log_params({"seed": 1})
        log_steps(tracker, range(STEPS))
    server.start()
    try:
        (run,) = RunStore(server.url).runs("never")
        assert (run.status, run.params) == ("FINISHED", {"seed": "1"})
        assert abs(run.start_ms - started_ms) < 60_000
        assert RunStore(server.url).find(tracker.run_id).run_id == run.run_id, "its key still finds it"
        assert history(server.url, run.run_id) == WHOLE
    finally:
        server.kill()


def test_a_driver_killed_in_an_outage_loses_nothing_and_is_closed_with_a_reason(
    server: TrackingServer,
) -> None:
    command = [sys.executable, "-c", LOGS_UNTIL_KILLED, server.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdin is not None
        assert victim.stdout is not None
        run_id = victim.stdout.readline().strip()
        server.kill()
        victim.stdin.write("\n")
        victim.stdin.flush()
        assert victim.stdout.readline().strip() == "logged"
        victim.send_signal(signal.SIGKILL)
    server.start()
    run = RunStore(server.url).find(run_id)
    assert run.status == "KILLED"
    assert "its process was gone" in run.tags["fewstep.closed"]
    assert history(server.url, run_id) == WHOLE


def test_a_locked_sqlite_store_keeps_no_step_waiting(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path)
    tracker = tracker_of(uri, "locked", patience_s=1.0)
    log_steps(tracker, range(5))
    tracker.flush()
    lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    assert log_steps(tracker, range(5, STEPS)) < 2.0
    tracker.finish("FINISHED")
    lock.execute("ROLLBACK")
    lock.close()
    # The request that met the lock may still be waiting for it inside this process: both deliver the same.
    (run,) = RunStore(uri).runs("locked")
    assert deliver_leftovers(uri) == 0
    assert history(uri, run.run_id) == WHOLE
    assert RunStore(uri).find(run.run_id).status == "FINISHED"


def test_a_slow_server_slows_nothing_but_its_own_records(server: TrackingServer) -> None:
    with _Slow(server.url, delay_s=0.4) as slow:
        tracker = tracker_of(slow.url, "slow")
        assert log_steps(tracker, range(STEPS)) < 2.0
        tracker.finish("FINISHED")
        assert slow.num_requests > 3
    assert history(server.url, tracker.run_id) == WHOLE


class _Slow:
    """Passes every request on, late."""

    def __init__(self, target: str, delay_s: float) -> None:
        own = self
        self.num_requests = 0

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                own.num_requests += 1
                time.sleep(delay_s)
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                headers = {
                    k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")
                }
                asked = Request(target + self.path, data=body or None, headers=headers, method=self.command)
                with self._answer(asked) as answer:
                    content = answer.read()
                    self.send_response(answer.status)
                    self.send_header("content-type", answer.headers.get("content-type", "application/json"))
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def _answer(self, asked: Request) -> Any:
                try:
                    return urlopen(asked, timeout=60)
                except HTTPError as refusal:
                    return refusal

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

            def log_message(self, format: str, *arguments: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()


@pytest.mark.ray
def test_a_refinement_survives_an_outage_of_its_whole_length(tmp_path: Path) -> None:
    server = TrackingServer(tmp_path / "server", start=False)
    job = [
        sys.executable, "-m", "fewstep", "refine", "--ray-cpus", "2", "--out", "runs/refine", f"tracking_uri={server.url}", "steps=2",
        "checkpoint_every=1", "prompts_per_step=8", "group_size=2", "num_eval_tasks=8", "num_replicas=1",
        "sweep.thresholds=[0.9]", "sweep.tokens_per_step=[]", "trainer.num_ranks=1",
    ]  # fmt: skip
    refused = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "tracking uri" in refused.stderr
    done = subprocess.run(
        [*job, "require_tracking=false"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "refine" / "report.json").read_text())
    # Nothing could be registered yet: what is served is the folder.
    assert report["mlflow"]["model_uri"].endswith("runs/refine/model")
    server.start()
    try:
        listed = subprocess.run(
            [sys.executable, "-m", "fewstep", "runs", "--tracking-uri", server.url],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert listed.returncode == 0, listed.stderr
        assert "FINISHED" in listed.stdout
        assert "fewstep-tiny/1@candidate" in listed.stdout
        client = open_client(server.url, create=False)
        run = client.search_runs([client.get_experiment_by_name("fewstep").experiment_id])[0]
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "reward/pass_rate")]
        assert steps == [1, 2]
        assert (
            len(client.search_logged_models([run.info.experiment_id])) == 3
        )  # two checkpoints, one registered
    finally:
        server.kill()
