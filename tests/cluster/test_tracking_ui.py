"""`fewstep ui`: pages on loopback, a link, and nothing left behind."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from fewstep.__main__ import main
from fewstep.platform.mlflow_store import sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    uri = sqlite_uri(tmp_path)
    MlflowTracker(uri, experiment="shown", run_name="r", system_metrics=False).finish("FINISHED")
    return uri


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_pages_are_served_until_a_signal_and_nothing_stays(uri: str, number: int, code: int) -> None:
    command = [sys.executable, "-m", "fewstep", "ui", "--port", "0", "--tracking-uri", uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting MLflow\n"
        found = re.search(r"http://127\.0\.0\.1:(\d+)/#/experiments/\d+/runs", process.stdout.readline())
        assert found is not None
        with urlopen(f"http://127.0.0.1:{found[1]}/", timeout=30) as answer:
            assert b"MLflow" in answer.read()
        with urlopen(
            f"http://127.0.0.1:{found[1]}/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=shown"
        ) as answer:
            assert b'"shown"' in answer.read()
        children = psutil.Process(process.pid).children(recursive=True)
        listening = {
            c.laddr.ip for child in children for c in child.net_connections() if c.status == "LISTEN"
        }
        assert listening == {"127.0.0.1"}
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_port_in_use_is_one_line(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["ui", "--tracking-uri", uri, "--port", str(taken.getsockname()[1])]) == 2
    assert "a port in use" in capsys.readouterr().err
