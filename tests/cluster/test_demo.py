"""The main job, small: the whole story in one command, and what Ctrl-C leaves of it."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SMALL = [
    "refine.steps=2", "refine.prompts_per_step=8", "refine.group_size=2", "refine.num_eval_tasks=24",
    "refine.sweep.thresholds=[0.9]", "refine.sweep.tokens_per_step=[]", "refine.trainer.num_ranks=1",
]  # fmt: skip
KEYS = {
    "before", "after", "speedup_forwards", "speedup_vs_sequential", "refine_seconds", "total_seconds",
    "peak_rss_bytes", "mlflow", "serve", "machine", "commit",
}  # fmt: skip


def _start(out: Path, *more: str) -> subprocess.Popen[str]:
    store = f"refine.tracking_uri=sqlite:///{out / 'mlflow.db'}"
    command = [sys.executable, "-m", "fewstep", "demo", "--out", str(out), store, *SMALL, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _statuses(out: Path) -> list[str]:
    with sqlite3.connect(out / "mlflow.db") as store:
        return [status for (status,) in store.execute("select status from runs")]


def test_the_demo_measures_refines_tracks_and_serves(tmp_path: Path) -> None:
    process = _start(tmp_path)
    text, _ = process.communicate(timeout=800)
    assert process.returncode == 0, text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() >= KEYS
    point = {
        "pass_at_1",
        "forwards_per_answer",
        "tokens_per_forward",
        "tokens_per_second",
        "num_tasks",
        "policy",
    }
    assert point <= report["before"].keys()
    assert report["before"]["num_tasks"] == 24
    assert report["serve"]["openai_client_ok"]
    assert report["serve"]["text"].startswith("\n    ")
    # Two steps are few: the alias says whether the unrefined model's bar was held.
    alias = "champion" if report["held_bar"] else "candidate"
    assert report["mlflow"]["model_uri"] == f"models:/fewstep-tiny@{alias}"
    assert report["peak_rss_bytes"] > 10**8
    assert _statuses(tmp_path) == ["FINISHED"]
    assert (tmp_path / "film.png").is_file()
    assert "fewstep serve --model" in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything_and_the_run_says_killed(tmp_path: Path, number: int, code: int) -> None:
    process = _start(tmp_path, "refine.steps=500")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("refine "):
            break
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) > 5
    process.send_signal(number)
    process.stdout.read()
    assert process.wait(120) == code
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert _statuses(tmp_path) == ["KILLED"]
    assert (tmp_path / "rollouts").is_dir()
    assert not (tmp_path / "report.json").exists()


def test_a_port_in_use_is_known_before_work_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = _start(tmp_path, f"port={taken.getsockname()[1]}")
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a port in use" in text
    assert text.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()
