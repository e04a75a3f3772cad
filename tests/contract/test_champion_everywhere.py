"""One address, three ways to use it, each a process of its own: the same text for the same seed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from openai import OpenAI

from fewstep.kernels.model.checkpoint import embedded_model
from fewstep.pipelines.publish import publish_model
from fewstep.platform.mlflow_store import sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import DecodePolicy
from fewstep.platform.rng import derive_seed

pytestmark = [pytest.mark.timeout(900), pytest.mark.ray]
ADDRESS = "models:/shared@champion"
PROMPT = 'def f(xs):\n    """keep odd; add 3; sum"""'
TASK = {
    "task_id": "odd", "prompt": PROMPT, "canonical_solution": "\n    return 0\n",
    "check": {"kind": "call", "entry_point": "f", "inputs": [[[1, 2]]], "expected": [4]},
}  # fmt: skip
# What an evaluation's first answer to that task is drawn with (pipelines/evaluation.py).
SEED = derive_seed("evaluate", "tasks", "odd", 0, 0)
ASK = """
import json, sys
import mlflow
params = {"max_tokens": 60, "temperature": 1.0, "seed": int(sys.argv[3]), "threshold": 0.5}
print(json.dumps(mlflow.pyfunc.load_model(sys.argv[1]).predict([sys.argv[2]], params=params)))
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = sqlite_uri(tmp_path_factory.mktemp("store"))
    with MlflowTracker(uri, experiment="shared", run_name="r", system_metrics=False) as tracker:
        publish_model(
            tracker, embedded_model(), name="shared", alias="champion", metrics={}, input_example=PROMPT,
            policy=DecodePolicy(),
        )  # fmt: skip
    return uri


def from_pyfunc(uri: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK, ADDRESS, PROMPT, str(SEED)], capture_output=True, text=True, check=False,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (text,) = json.loads(done.stdout.splitlines()[-1])
    return str(text)


def from_evaluate(uri: str, folder: Path) -> str:
    folder.mkdir()
    (folder / "tasks.jsonl").write_text(json.dumps(TASK) + "\n")
    command = [
        sys.executable, "-m", "fewstep", "evaluate", f"model={ADDRESS}", f"tracking_uri={uri}", f"out={folder / 'run'}",
        f"benchmarks=tasks:{folder / 'tasks.jsonl'}", "temperature=1.0", "max_tokens=60", "num_replicas=1",
        "sweep.thresholds=[0.5]", "sweep.tokens_per_step=[]",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(folder / "run" / "answers.parquet")
    (text,) = frame[frame.policy.str.startswith("threshold_0.5")].text
    return str(text)


@contextmanager
def serving(uri: str) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "fewstep",
        "serve",
        "--model",
        ADDRESS,
        "--tracking-uri",
        uri,
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = next(found for line in server.stdout if (found := re.search(r"http://\S+/v1", line)))
            yield address[0]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def from_serve(uri: str) -> str:
    with serving(uri) as address, OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model="shared", prompt=PROMPT, max_tokens=60, temperature=1.0, seed=SEED,
            extra_body={"fewstep": {"kind": "threshold", "threshold": 0.5}},
        )  # fmt: skip
    return answer.choices[0].text


def test_pyfunc_evaluate_and_serve_write_the_same_text(uri: str, tmp_path: Path) -> None:
    text = from_pyfunc(uri)
    assert len(text) > 10
    assert from_evaluate(uri, tmp_path / "evaluate") == text
    assert from_serve(uri) == text
