"""The on-policy loop: what it keys, what it records, and that it learns to need fewer steps."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from tests.pipelines.small_run import IdleTrainer

from fewstep.actors.engine.engine import Engine
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.trainer_rank import Metrics
from fewstep.actors.verifier import LocalVerifier
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.kernels.rows import SampleRows
from fewstep.pipelines.objectives.distill import Distill
from fewstep.pipelines.policy_update import learning_rate
from fewstep.pipelines.refine import Progress, Workers, advance, refine
from fewstep.pipelines.refine_job import make_objective
from fewstep.pipelines.refine_job import run as run_job
from fewstep.pipelines.rollouts import rollout_policy
from fewstep.pipelines.settings import Curriculum, RefineConfig, Sweep
from fewstep.pipelines.task_source import draw_family, open_tasks
from fewstep.pipelines.tasks.family import Specification
from fewstep.platform.errors import ConfigError
from fewstep.platform.mlflow_store import sqlite_uri
from fewstep.platform.records import WeightVersion
from fewstep.platform.tracking import MemoryTracker
from fewstep.platform.trajectories import read_rollouts

SMALL = RefineConfig(steps=2, prompts_per_step=4, group_size=2, updates_per_step=1, trainer={"num_ranks": 1})


class RecordingTrainer(IdleTrainer):
    """Keeps what it was given: the loop's own arithmetic becomes visible."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.batches: list[Sequence[SampleRows]] = []

    def update(self, samples: Sequence[SampleRows], learning_rate: float) -> Metrics:
        self.batches.append(samples)
        return super().update(samples, learning_rate)


def _run(config: RefineConfig) -> tuple[RecordingTrainer, Progress, MemoryTracker, list[WeightVersion]]:
    model, tokenizer = load_model(embedded_model())
    engine = Engine(model, tokenizer, max_sequences=16, weight_version=WeightVersion("test", 0, ""))
    trainer, tracker, pushed = RecordingTrainer(model), MemoryTracker(), []

    def push(state: Mapping[str, torch.Tensor], version: WeightVersion) -> dict[str, float]:
        pushed.append(version)
        return {"sync/seconds": 0.0}

    with LocalVerifier() as verifier:
        workers = Workers(engine.generate, verifier.verify, trainer, push)
        source = open_tasks(config, model.config, tokenizer, ChatTemplate(embedded_model()), verifier)
        progress = refine(
            config,
            model.config,
            tokenizer,
            source,
            Distill(),
            workers,
            tracker,
            Progress(),
            lambda progress: None,
        )
    return trainer, progress, tracker, pushed


def test_a_run_is_a_function_of_its_configuration(tmp_path: Path) -> None:
    runs = [_run(SMALL.model_copy(update={"out": tmp_path / name})) for name in ("a", "b")]
    for one, two in zip(runs[0][0].batches, runs[1][0].batches, strict=True):
        assert [s.tokens.tolist() for s in one] == [s.tokens.tolist() for s in two]
        assert [s.weights.tolist() for s in one] == [s.weights.tolist() for s in two]
    first, second = (
        read_rollouts(tmp_path / name / "rollouts" / "step_00001.parquet") for name in ("a", "b")
    )
    assert [(r.text, r.reward) for r in first] == [(r.text, r.reward) for r in second]
    _, progress, _tracker, pushed = runs[0]
    assert progress.step == 2
    assert [version.step for version in pushed] == [1, 2]
    assert {"reward/pass_rate", "rollout/forwards_per_answer", "sync/seconds"} <= set(progress.history[0])


def test_training_weights_add_up_to_the_share_of_trained_tokens(tmp_path: Path) -> None:
    """Every kept rollout shows state 0, so each of its chosen tokens weighs at least once."""
    trainer, *_ = _run(SMALL.model_copy(update={"out": tmp_path, "steps": 1}))
    (samples,) = trainer.batches
    assert 1 <= len(samples) <= SMALL.prompts_per_step
    assert 0.9 <= sum(float(s.weights.sum()) for s in samples) <= 2.0


def test_tasks_of_a_step_are_new_training_tasks() -> None:
    one, two = draw_family(0, 0, 30), draw_family(0, 1, 30)
    assert len({task.task_id for task in one}) == 30
    assert len({task.task_id for task in one} & {task.task_id for task in two}) <= 1
    assert not any(Specification.parse(task.task_id).held_out for task in one + two)


def test_threshold_falls_while_rollouts_pass_and_rises_when_they_do_not() -> None:
    config = RefineConfig(curriculum=Curriculum(start=0.9, end=0.86, step=0.02, pass_rate=0.8))
    progress = Progress(threshold=0.9)
    seen = []
    for rate in (0.9, 0.9, 0.9, 0.1, 0.1, 0.1):
        advance(config, progress, {"reward/pass_rate": rate}, seconds=1.0)
        seen.append(round(progress.threshold, 2))
    assert seen == [0.88, 0.86, 0.86, 0.88, 0.9, 0.9]
    assert rollout_policy(config, 0.88).threshold == 0.88


def test_rate_of_a_timed_run_follows_the_clock() -> None:
    config = RefineConfig(learning_rate=1.0, decay_share=0.5, warmup_steps=1)
    assert [learning_rate(config, 50, done) for done in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.1]


def test_unknown_objectives_and_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"objective.*did you mean distill"):
        make_objective(RefineConfig(objective="distil"))
    with pytest.raises(ConfigError, match="objective_options"):
        make_objective(RefineConfig(objective_options={"keeep": 2}))


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_refinement_needs_fewer_forwards_and_survives_killed_workers(tmp_path: Path) -> None:
    """The whole job on two replicas, with one replica and one verifier killed on the way."""
    config = RefineConfig(
        out=tmp_path, steps=10, prompts_per_step=32, group_size=4, learning_rate=1e-3, num_eval_tasks=60,
        sweep=Sweep(thresholds=(0.9,), tokens_per_step=()), trainer={"num_ranks": 1, "precision": "bf16"},
        checkpoint_every=4, tracking_uri=sqlite_uri(tmp_path),
    )  # fmt: skip
    killer = threading.Thread(target=_kill_workers, args=(tmp_path / "rollouts",), daemon=True)
    with ray_session(num_cpus=2):
        killer.start()
        result = run_job(config)
    report = json.loads((tmp_path / "report.json").read_text())
    before, after = (report[f"frontier_{when}"][1] for when in ("before", "after"))
    assert before["label"] == after["label"] == "threshold_0.9"
    assert after["forwards_per_answer"] < 0.8 * before["forwards_per_answer"]
    assert after["pass_at_1"] > 0.8
    assert report["replicas_replaced"] >= 1
    assert report["steps"] == 10
    # Ten steps are few: the alias says whether the unrefined model's bar was held.
    alias = "champion" if report["held_bar"] else "candidate"
    assert result.model_uri == f"models:/fewstep-tiny@{alias}"
    for name in ("frontier.png", "curves.png", "steps.png", "model/model.safetensors", "mlflow.db"):
        assert (tmp_path / name).is_file(), name
    assert len(list((tmp_path / "rollouts").glob("*.parquet"))) == 10


def _kill_workers(rollouts: Path) -> None:
    """kill -9 one replica and one verifier worker of this test's own cluster, once two steps are done."""
    while not (rollouts / "step_00001.parquet").is_file():
        time.sleep(0.2)
    for name in ("ray::Replica", "ray::VerifierWorker"):
        os.kill(_worker(name), signal.SIGKILL)


def _worker(name: str) -> int:
    """The pid of one of this test's own Ray workers, by the title Ray gives it."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone, or a zombie of an earlier session
            if any(name in part for part in process.cmdline()[:1]):
                return process.pid
    raise AssertionError(f"no {name} is running")
