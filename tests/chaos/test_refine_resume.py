"""Ctrl-C in the middle of a refinement, then the same command again: the run ends where an uninterrupted one does,
and its record is one run with every step once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.platform.mlflow_runs import RunStore
from fewstep.platform.mlflow_store import open_client, sqlite_uri
from fewstep.platform.trajectories import read_rollouts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

# One replica: a forward's rounding depends on who shares it, and two replicas share the work by the clock.
SMALL = [
    "steps=4", "checkpoint_every=2", "prompts_per_step=8", "group_size=2", "num_eval_tasks=8", "num_replicas=1",
    "sweep.thresholds=[0.9]", "sweep.tokens_per_step=[]", "trainer.num_ranks=1",
]  # fmt: skip


def _start(out: Path, *more: str) -> subprocess.Popen[str]:
    store = f"tracking_uri={sqlite_uri(out.parent)}"
    command = [
        sys.executable,
        "-m",
        "fewstep",
        "refine",
        "--ray-cpus",
        "2",
        "--out",
        str(out),
        store,
        *SMALL,
        *more,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(out: Path, *more: str) -> str:
    with _start(out, *more) as process:
        text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return text


def test_an_interrupted_refinement_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _finish(whole)
    with _start(broken) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("refine    3/4"):
                process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    # Where models are registered is no part of what is computed: it may change, and the run says that it did.
    assert "resumed at step 2" in _finish(broken, "register_as=other")
    for step in range(4):
        name = Path("rollouts") / f"step_{step:05d}.parquet"
        one, two = read_rollouts(whole / name), read_rollouts(broken / name)
        assert [(r.text, r.reward) for r in one] == [(r.text, r.reward) for r in two]
    weights = Path("model") / "model.safetensors"
    assert (whole / weights).read_bytes() == (broken / weights).read_bytes()
    _check_record(tmp_path)


def _check_record(folder: Path) -> None:
    uri = sqlite_uri(folder)
    (run,) = (run for run in RunStore(uri).runs() if run.name.startswith("refine-broken"))
    assert (run.status, run.tags["fewstep.resumed"]) == ("FINISHED", "1")
    assert run.params["register_as"] == "fewstep-tiny"
    (version,) = run.versions
    assert version.startswith("other/1@candidate")
    client = open_client(uri, create=False)
    steps = [point.step for point in client.get_metric_history(run.run_id, "reward/pass_rate")]
    assert steps == [1, 2, 3, 4]
    kept = [item.path for item in client.list_artifacts(run.run_id, "resumed")]
    (difference,) = (path for path in kept if path.endswith(".diff"))
    text = Path(client.download_artifacts(run.run_id, difference)).read_text()
    assert "-register_as: fewstep-tiny" in text
    assert "+register_as: other" in text
