"""Recorded rollouts train the same model again, bit for bit; and rollouts can be recorded without training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.pipelines.rollouts import check_recorded
from fewstep.platform.errors import UserError
from fewstep.platform.mlflow_store import sqlite_uri
from fewstep.platform.records import WeightVersion
from fewstep.platform.trajectories import read_metadata, read_rollouts, write_rollouts

SMALL = [
    "in_process=true", "trainer.num_ranks=1", "trainer.precision=fp32", "prompts_per_step=8", "group_size=2",
    "num_eval_tasks=4", "sweep.thresholds=[0.9]", "sweep.tokens_per_step=[]", "objective=seed",
    "objective_options={kl: 0.1}", "temperature=1.0", "learning_rate=1e-3",
]  # fmt: skip


def refine(folder: Path, *more: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "fewstep", "refine", *SMALL, f"tracking_uri={sqlite_uri(folder)}", *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.timeout(400)
def test_a_replay_ends_with_the_same_weights(tmp_path: Path) -> None:
    # The answers that are retained are the unrefined model's own: a replay takes the recorded ones.
    retain = "retain={noise: 0.2, num_documents: 8, documents_per_update: 2}"
    refine(tmp_path, "out=first", "steps=3", retain)
    refine(tmp_path, "out=again", "steps=3", "replay=first/rollouts", "seed=0", retain)
    weights = Path("model") / "model.safetensors"
    first = (tmp_path / "first" / weights).read_bytes()
    assert (tmp_path / "again" / weights).read_bytes() == first
    for step in range(3):
        name = Path("rollouts") / f"step_{step:05d}.parquet"
        one, two = read_rollouts(tmp_path / "first" / name), read_rollouts(tmp_path / "again" / name)
        assert [(r.text, r.reward, r.advantage) for r in one] == [
            (r.text, r.reward, r.advantage) for r in two
        ]
        version = WeightVersion(*one[0].trajectory.weight_version_first.rsplit(":", 2))
        assert int(version.step) == step
    last = json.loads((tmp_path / "again" / "history.jsonl").read_text().splitlines()[-1])
    assert last["train/retain_kl"] > 0
    assert 0 < last["train/retain_row_share"] < 1
    # It is the rollouts that train: without the ones that were recorded, the weights are others.
    refine(tmp_path, "out=other", "steps=3", "seed=1")
    assert (tmp_path / "other" / weights).read_bytes() != first
    assert "outside out" in refine(tmp_path, "out=first", "replay=first/rollouts", "steps=3", code=2)
    assert "step_00003" in refine(tmp_path, "out=more", "replay=first/rollouts", "steps=4", code=2)


@pytest.mark.timeout(300)
def test_rollouts_alone_are_recorded_and_go_on_where_they_were(tmp_path: Path) -> None:
    text = refine(tmp_path, "out=recorded", "steps=2", "rollouts_only=true")
    assert "wrote 2 files" in text
    paths = check_recorded(tmp_path / "recorded" / "rollouts", 2)
    assert [read_metadata(path)["share_done"] for path in paths] == [0.0, 0.5]
    assert not (tmp_path / "recorded" / "model").exists()
    paths[1].unlink()
    again = refine(tmp_path, "out=recorded", "steps=2", "rollouts_only=true")
    assert "rollouts    1/2" not in again
    assert "rollouts    2/2" in again


def test_rollouts_of_something_else_are_no_replay(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "step_00000.parquet", [], {"policy": "x"})
    with pytest.raises(UserError, match="no prompts, share_done, threshold"):
        check_recorded(tmp_path, 1)
