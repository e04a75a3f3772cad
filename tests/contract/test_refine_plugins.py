"""docs/refine.md says how to write a verifier and an objective: what it shows is run as shown, and is short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.pipelines.tasks.family import tasks
from fewstep.pipelines.tasks.files import write_tasks
from fewstep.platform.mlflow_store import sqlite_uri
from fewstep.platform.trajectories import read_rollouts

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {
    match[1]: match[0]
    for match in re.finditer(
        r"# (\w+)\.py\n.*?(?=^```)", (ROOT / "docs" / "refine.md").read_text(), re.DOTALL | re.MULTILINE
    )
}


def test_both_are_shown_in_under_forty_lines() -> None:
    assert SHOWN.keys() == {"short_answers", "best_of_group"}
    assert all(len(text.splitlines()) < 40 for text in SHOWN.values())


@pytest.mark.timeout(300)
def test_a_refinement_uses_what_is_shown(tmp_path: Path) -> None:
    for name, text in SHOWN.items():
        (tmp_path / f"{name}.py").write_text(text)
    write_tasks(tmp_path / "tasks.jsonl", tasks(40, 5, held_out=False))
    command = [
        sys.executable, "-m", "fewstep", "refine", "tasks=tasks:tasks.jsonl", "out=run", "in_process=true",
        "verifier=short_answers:ShortAnswers", "verifier_options.max_lines=3",
        "objective=best_of_group:BestOfGroup", "steps=1", "prompts_per_step=8", "group_size=2", "trainer.num_ranks=1",
        "sweep.thresholds=[0.9]", "sweep.tokens_per_step=[]", f"tracking_uri={sqlite_uri(tmp_path)}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rollouts = read_rollouts(tmp_path / "run" / "rollouts" / "step_00000.parquet")
    assert len(rollouts) == 16
    for rollout in rollouts:
        long = rollout.text.strip().count("\n") + 1 > 3
        assert (rollout.verdict.detail.endswith(" lines")) == long
        assert not (long and rollout.verdict.passed)
    assert any(rollout.verdict.passed for rollout in rollouts)
    for wrong in ("verifier=short_answers:Nothing", "objective=best_of_group:Nothing"):
        done = subprocess.run([*command, wrong], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Nothing" in done.stderr
