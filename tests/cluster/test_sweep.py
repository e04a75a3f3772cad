"""Sweeps: which trials there are, that they are nested runs, and that an interrupted sweep goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.__main__ import main
from fewstep.cluster.sweep import run_trial
from fewstep.cluster.sweep_settings import Range, SweepConfig, trials_of
from fewstep.pipelines.settings import PretrainConfig, RefineConfig
from fewstep.platform.config import load_config
from fewstep.platform.mlflow_runs import RunStore
from fewstep.platform.mlflow_store import sqlite_uri

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "steps": 6, "batch_size": 4, "checkpoint_every": 2, "warmup_steps": 2,
    "phases": [{"block_size": 8, "share": 1.0}],
    "size": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 48, "max_position_embeddings": 128, "block_size": 8},
    "trainer": {"compiled": False},
}  # fmt: skip


def test_a_grid_is_every_combination_in_order(tmp_path: Path) -> None:
    config = SweepConfig(
        out=tmp_path, base={"steps": 3, "curriculum": {"end": 0.5}}, grid={"learning_rate": [1e-3, 1e-4], "curriculum.step": [0.1, 0.2]},
    )  # fmt: skip
    trials = trials_of(config)
    assert [trial.values for trial in trials] == [
        {"learning_rate": rate, "curriculum.step": step} for rate in (1e-3, 1e-4) for step in (0.1, 0.2)
    ]
    assert trials[2].name == "002-learning_rate-0.0001-step-0.1"
    own = trials[2].config
    assert isinstance(own, RefineConfig)
    assert (own.steps, own.learning_rate, own.curriculum.step, own.curriculum.end) == (3, 1e-4, 0.1, 0.5)
    assert own.curriculum.start == RefineConfig().curriculum.start, (
        "what base does not name keeps the job's default"
    )
    assert own.out == tmp_path / "trials" / trials[2].name


def test_draws_are_a_function_of_seed_key_and_number() -> None:
    spread = Range(low=1e-4, high=1e-2, log=True)
    values = [spread.draw(number, "learning_rate", 0) for number in range(200)]
    assert values == [spread.draw(number, "learning_rate", 0) for number in range(200)]
    assert values != [spread.draw(number, "learning_rate", 1) for number in range(200)]
    assert all(1e-4 <= value <= 1e-2 for value in values)
    assert 60 < sum(value < 1e-3 for value in values) < 140, "even in the logarithm"
    whole = {Range(low=2, high=4, integer=True).draw(number, "group_size", 0) for number in range(50)}
    assert whole == {2, 3, 4}
    few = SweepConfig(random={"learning_rate": spread}, num_draws=2)
    more = SweepConfig(random={"learning_rate": spread}, num_draws=5)
    assert [t.values for t in trials_of(few)] == [t.values for t in trials_of(more)][:2]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, ["grid or random must name"]),
        ({"grid": {"lr": [1]}}, ["trial 0, lr", "learning_rate"]),
        ({"grid": {"learning_rate": [1e-3, "fast"]}}, ["trial 1, learning_rate", "'fast'"]),
        ({"grid": {"learning_rate": []}}, ["no values for learning_rate"]),
        ({"grid": {"out": ["a"]}}, ["out is set by the sweep"]),
        ({"grid": {"seed": [1]}, "random": {"seed": {"low": 0, "high": 9}}}, ["seed cannot be both"]),
        ({"random": {"learning_rate": {"low": 2, "high": 1}}}, ["low must be below high"]),
        ({"random": {"learning_rate": {"low": 0, "high": 1, "log": True}}}, ["above 0 where log"]),
        ({"grid": {"seed": [1]}, "concurrent": 50}, ["trials: got 50 x 2 CPU", "free on the cluster"]),
    ],
)
def test_a_sweep_that_cannot_run_is_one_line_before_anything_starts(
    keys: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), **keys}))
    assert main(["sweep", str(path), "--ray-cpus", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("sweep*.yaml")), ids=lambda path: path.name)
def test_every_shipped_sweep_has_trials_its_job_accepts(path: Path) -> None:
    assert len(trials_of(load_config(SweepConfig, path, []))) >= 4


def test_a_trial_that_fails_says_why_and_keeps_its_log(tmp_path: Path) -> None:
    config = PretrainConfig.model_validate({**TINY, "out": tmp_path})
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "progress.json").write_text('{"fingerprint": "other", "values": {"step": 1}}')
    outcome = run_trial("pretrain", config, {})
    assert outcome["status"] == "failed"
    assert "another configuration" in outcome["error"]
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def sweep_file(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "sweep.yaml"
    base = {**TINY, **changes.pop("base", {})}
    keys = {
        "command": "pretrain",
        "out": str(tmp_path / "sweep"),
        "base": base,
        "grid": {"learning_rate": [1e-3, 2e-3]},
    }
    path.write_text(yaml.safe_dump({**keys, "tracking_uri": sqlite_uri(tmp_path), **changes}))
    return path


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fewstep", "sweep", str(path), "--ray-cpus", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, base={"steps": 4000, "checkpoint_every": 50})
    # The first trial is short, so that the signal meets the second one at work.
    path.write_text(
        path.read_text().replace("learning_rate:\n  - 0.001\n  - 0.002", "steps:\n  - 4\n  - 4000")
    )
    with start(path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(r"  001  step +\d+/4000", line):
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        assert process.wait(180) == 130
    store = RunStore(sqlite_uri(tmp_path))
    before = {run.tags.get("fewstep.trial", "sweep"): run for run in store.runs()}
    assert {name: run.status for name, run in before.items()} == {
        "sweep": "KILLED", "000-steps-4": "FINISHED", "001-steps-4000": "KILLED"
    }  # fmt: skip
    assert {run.parent_id for name, run in before.items() if name != "sweep"} == {before["sweep"].run_id}
    first = (tmp_path / "sweep" / "trials" / "000-steps-4" / "model" / "model.safetensors").stat().st_mtime_ns

    state = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [own["status"] for own in state["trials"].values()] == ["finished", "running"]
    progress = tmp_path / "sweep" / "trials" / "001-steps-4000" / "checkpoint" / "progress.json"
    at = json.loads(progress.read_text())["values"]["step"] if progress.is_file() else 0
    with start(path) as process:
        assert process.stdout is not None
        told = ""
        for line in process.stdout:
            told += line
            if re.match(r"  001  step +\d+/4000", line):
                process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 143
    assert "1 of 2 trials are done" in told
    log = (tmp_path / "sweep" / "trials" / "001-steps-4000" / "log.txt").read_text()
    if at:
        assert f"resumed at step {at}" in log
    after = {run.tags.get("fewstep.trial", "sweep"): run for run in RunStore(sqlite_uri(tmp_path)).runs()}
    assert after["sweep"].run_id == before["sweep"].run_id, "the sweep goes on with its run"
    if at:
        assert after["001-steps-4000"].run_id == before["001-steps-4000"].run_id
    assert (
        tmp_path / "sweep" / "trials" / "000-steps-4" / "model" / "model.safetensors"
    ).stat().st_mtime_ns == first


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_sweep_ranks_its_trials_and_refuses_another_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, concurrent=2)
    with start(path) as process:
        text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert re.search(r"trial +learning_rate +nll_per_token +status +took +run", text)
    store = RunStore(sqlite_uri(tmp_path))
    (parent,) = (run for run in store.runs() if not run.parent_id)
    children = store.children(parent.run_id)
    assert [run.params["learning_rate"] for run in children] in (["0.001", "0.002"], ["0.002", "0.001"])
    assert parent.tags["fewstep.best_run"] in {run.run_id for run in children}
    assert parent.metrics.keys() >= {"sweep/nll_per_token"}
    goals = [
        own["goal"] for own in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"].values()
    ]
    assert all(goal > 0 for goal in goals)
    sweep_file(tmp_path, grid={"learning_rate": [5e-3, 6e-3]})
    assert main(["sweep", str(path)]) == 2
    assert "another sweep" in capsys.readouterr().err
