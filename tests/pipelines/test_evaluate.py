"""`fewstep evaluate`: what it writes, what it refuses before it starts, and the proof of the verifier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from fewstep.actors.engine.engine import Engine
from fewstep.actors.verifier import LocalVerifier
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import load_model, save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.pipelines.evaluate import (
    BROKEN_BODIES,
    choose_tasks,
    evaluate,
    prove_verifier,
    refuse_what_does_not_fit,
    run,
)
from fewstep.pipelines.settings import EvaluateConfig, Sweep
from fewstep.pipelines.tasks.family import Specification
from fewstep.pipelines.tasks.files import write_tasks
from fewstep.pipelines.tasks.humaneval import load_humaneval
from fewstep.pipelines.tasks.vocabulary import EOS, MASK, PAD, build_tokenizer
from fewstep.platform.errors import CheckpointError, FewstepError, RequestError
from fewstep.platform.records import Task, Verdict, WeightVersion
from fewstep.platform.trajectories import read_metadata, read_rollouts

SWEEP = Sweep(thresholds=(0.9,), tokens_per_step=(8,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned nothing."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    mask, eos, pad = (tokenizer.token_to_id(token) for token in (MASK, EOS, PAD))
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, intermediate_size=16, max_position_embeddings=96, block_size=8,
        mask_token_id=mask, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    model = Transformer(config)
    model.initialise(0)
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(path, model.state_dict(), config, tokenizer)
    return path


@pytest.fixture
def loaded(folder: Path) -> tuple[ModelConfig, Tokenizer, Engine]:
    model, tokenizer = load_model(folder)
    return model.config, tokenizer, Engine(model, tokenizer, weight_version=WeightVersion("test", 0, "0"))


class Gullible:
    """A verifier that passes everything."""

    def verify(self, answers: Sequence[tuple[Task, str]]) -> list[Verdict]:
        return [Verdict("passed", 1.0, (True,), 0.0, "none") for _ in answers]

    def close(self) -> None:
        """Nothing was started."""


def test_a_measurement_leaves_report_table_figures_and_trajectories(
    tmp_path: Path, loaded: tuple[ModelConfig, Tokenizer, Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, engine = loaded
    config = EvaluateConfig(out=tmp_path / "run", num_tasks=4, max_tokens=24, sweep=SWEEP)
    tasks = choose_tasks(config)
    identity = {"address": "test", "weights_sha256": "0"}
    with LocalVerifier() as verifier:
        points = evaluate(config, identity, model, tokenizer, tasks, engine.generate, verifier)

    assert sorted(path.name for path in config.out.iterdir()) == [
        "film.png", "frontier.md", "frontier.png", "report.json", "trajectories.parquet",
    ]  # fmt: skip
    report = json.loads((config.out / "report.json").read_text())
    assert report["model"] == identity
    assert [row["label"] for row in report["points"]] == ["static_1", "threshold_0.9", "static_8"]
    assert [row["forwards_per_answer"] for row in report["points"]] == [p.forwards_per_answer for p in points]
    assert {row["num_tasks"] for row in report["points"]} == {4}
    # Real verdicts: noise is not even a program, and the bar of a model that solves nothing is nothing.
    assert all(row["pass_at_1"] == 0.0 and sum(row["outcomes"].values()) == 4 for row in report["points"])
    assert (report["bar"], report["cheapest"]) == (0.0, "static_8")
    ratio = points[0].forwards_per_answer / points[2].forwards_per_answer
    assert report["speedup_vs_sequential"] == pytest.approx(ratio)
    assert report["settings"]["sweep"] == {"thresholds": [0.9], "tokens_per_step": [8]}

    rollouts = read_rollouts(config.out / "trajectories.parquet")
    assert read_metadata(config.out / "trajectories.parquet")["model"] == identity
    assert [rollout.task_id for rollout in rollouts] == [task.task_id for task in tasks] * 3
    per_policy = [rollouts[start : start + 4] for start in (0, 4, 8)]
    means = [sum(r.trajectory.forwards for r in found) / 4 for found in per_policy]
    assert means == [p.forwards_per_answer for p in points]
    assert "| static_8 | 0.000 |" in (config.out / "frontier.md").read_text()
    assert "Marked * is the cheapest policy at pass@1 of 0.000 or better." in capsys.readouterr().out


def test_tasks_come_from_the_family_or_from_a_file(tmp_path: Path) -> None:
    drawn = choose_tasks(EvaluateConfig(num_tasks=30))
    assert len({task.task_id for task in drawn}) == 30
    assert all(Specification.parse(task.task_id).held_out for task in drawn)
    assert choose_tasks(EvaluateConfig(num_tasks=30, seed=1)) != drawn
    write_tasks(tmp_path / "tasks.jsonl", drawn[:3])
    assert choose_tasks(EvaluateConfig(tasks=tmp_path / "tasks.jsonl")) == drawn[:3]


def test_a_prompt_that_does_not_fit_is_refused_by_name(loaded: tuple[ModelConfig, Tokenizer, Engine]) -> None:
    model, tokenizer, _ = loaded
    tasks = choose_tasks(EvaluateConfig(num_tasks=2))
    refuse_what_does_not_fit(EvaluateConfig(max_tokens=40), tasks, model, tokenizer)
    with pytest.raises(
        RequestError, match=rf"task {tasks[0].task_id}, max_tokens: got .*at most 96 together"
    ):
        refuse_what_does_not_fit(EvaluateConfig(max_tokens=90), tasks, model, tokenizer)


def test_a_missing_model_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    # No Ray session is open here, so a pool could not even be asked for.
    with pytest.raises(CheckpointError, match="absent"):
        run(EvaluateConfig(model=str(tmp_path / "absent"), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_sweep_has_greedy_policies_in_order() -> None:
    policies = EvaluateConfig().sweep.policies()
    assert [policy.label() for policy in policies[:2]] == ["threshold_0.95", "threshold_0.9"]
    assert [policy.label() for policy in policies[-2:]] == ["static_4", "static_16"]
    assert len(set(policies)) == 12
    assert {policy.temperature for policy in policies} == {0.0}


def test_a_sandbox_judges_humaneval_rightly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = load_humaneval()[:5]
    with LocalVerifier() as verifier:
        prove_verifier(EvaluateConfig(out=tmp_path), tasks, verifier, verifier.isolation)
        layers = verifier.isolation
    report = json.loads((tmp_path / "humaneval.json").read_text())
    assert (report["canonical"]["passed"], report["canonical"]["failed"]) == (5, 0)
    assert {body: found["passed"] for body, found in report["broken"].items()} == dict.fromkeys(
        BROKEN_BODIES, 0
    )
    assert report["canonical"]["isolation"] == [layers]
    assert report["canonical"]["verdicts_per_second"] > 0
    assert capsys.readouterr().out.count("0 passed,   5 failed") == len(BROKEN_BODIES)


def test_a_verifier_that_can_be_fooled_is_told_on(tmp_path: Path) -> None:
    tasks = load_humaneval()[:2]
    with pytest.raises(FewstepError, match="misjudged 8 programs: HumanEval/0 passed with `return None`"):
        prove_verifier(EvaluateConfig(out=tmp_path), tasks, Gullible(), "none")
    report = json.loads((tmp_path / "humaneval.json").read_text())
    assert report["canonical"]["misjudged"] == []
    assert report["broken"]["return None"]["misjudged"] == ["HumanEval/0", "HumanEval/1"]


@pytest.mark.ray
def test_the_job_runs_on_replicas_and_verifiers(tmp_path: Path, folder: Path) -> None:
    config = EvaluateConfig(model=str(folder), out=tmp_path, num_tasks=20, max_tokens=24, sweep=SWEEP)
    with ray_session(num_cpus=1):
        run(config)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [sum(row["outcomes"].values()) for row in report["points"]] == [20, 20, 20]
    assert len(report["model"]["weights_sha256"]) == 64
