"""Batches made ahead, looks at held-out tasks, and what a step asks of the trainer, with real engines and verdicts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.judges import JudgeChoice
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.trainer_rank import LogprobSource, Metrics
from fewstep.actors.verifier import LocalVerifier
from fewstep.kernels.model.checkpoint import embedded_model, load_model, load_state
from fewstep.kernels.rows import SampleRows
from fewstep.pipelines.held_out_checks import Standing, best_folder, keep_best
from fewstep.pipelines.objectives.coupled import Coupled
from fewstep.pipelines.objectives.credit import RefineObjective
from fewstep.pipelines.objectives.distill import Distill
from fewstep.pipelines.objectives.seed import Seed
from fewstep.pipelines.objectives.trajectory import Trace
from fewstep.pipelines.refine import BEST, Progress, Workers, advance, refine
from fewstep.pipelines.rollouts import Batch, MadeAhead
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.task_source import open_tasks
from fewstep.platform.errors import FewstepError
from fewstep.platform.records import Trajectory, WeightVersion
from fewstep.platform.tracking import MemoryTracker
from fewstep.platform.trajectories import read_rollouts


class Trainer:
    """Moves all weights a little every update, and answers every question about log-probabilities by its number."""

    def __init__(self, model: torch.nn.Module, shift: float) -> None:
        self._state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._shift = shift
        self.batches: list[Sequence[SampleRows]] = []
        self.asked: list[LogprobSource] = []

    def update(self, samples: Sequence[SampleRows], learning_rate: float) -> Metrics:
        self.batches.append(samples)
        for tensor in self._state.values():
            tensor.add_(self._shift * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
        return {"loss": 0.0, "targets": 1.0}

    def logprobs(self, samples: Sequence[SampleRows], source: LogprobSource) -> list[NDArray[np.float32]]:
        self.asked.append(source)
        value = -float(len(self.asked))
        return [np.full(len(sample.tokens), value, np.float32) for sample in samples]

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def save(self, folder: Path) -> None:
        raise AssertionError("the loop saves through its checkpoint callback")

    load = save


def run(
    out: Path, objective: RefineObjective | None = None, shift: float = 0.0, **keys: Any
) -> tuple[Trainer, Progress, MemoryTracker]:
    config = RefineConfig.model_validate(
        {
            "out": out, "steps": 4, "prompts_per_step": 3, "group_size": 2, "updates_per_step": 1,
            "trainer": {"num_ranks": 1}, "num_eval_tasks": 4, "temperature": 1.0, **keys,
        }
    )  # fmt: skip
    model, tokenizer = load_model(embedded_model())
    trainer, tracker = Trainer(model, shift), MemoryTracker()
    engine = Engine(model, tokenizer, max_sequences=16, weight_version=WeightVersion("test", 0, ""))
    users = set()

    def generate(requests: Sequence[Request]) -> list[Trajectory]:
        users.add(threading.get_ident())
        return engine.generate(requests)

    def push(state: Mapping[str, torch.Tensor], version: WeightVersion) -> Mapping[str, float]:
        users.add(threading.get_ident())
        engine.load_weights(state, WeightVersion("test", version.step, ""))
        return {}

    with LocalVerifier(judge=JudgeChoice(config.verifier, config.verifier_options)) as verifier:
        source = open_tasks(config, model.config, tokenizer, ChatTemplate(embedded_model()), verifier)
        workers = Workers(generate, verifier.verify, trainer, push)
        progress = refine(
            config, model.config, tokenizer, source, objective or Distill(), workers, tracker,
            Progress(threshold=config.curriculum.start), lambda progress: None,
        )  # fmt: skip
    assert len(users) <= 2
    return trainer, progress, tracker


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_batch_made_ahead_is_exactly_so_many_versions_old(tmp_path: Path, staleness: int) -> None:
    _, progress, _ = run(tmp_path, max_staleness=staleness, shift=1e-4)
    for step in range(4):
        rollouts = read_rollouts(tmp_path / "rollouts" / f"step_{step:05d}.parquet")
        versions = {
            int(version.split(":")[-2])
            for rollout in rollouts
            for version in (rollout.trajectory.weight_version_first, rollout.trajectory.weight_version_last)
        }
        assert versions == {max(0, step - staleness)}
    assert [row["rollout/staleness"] for row in progress.history] == [
        min(step, staleness) for step in range(4)
    ]


def test_a_run_ahead_is_a_function_of_its_configuration(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, max_staleness=1, shift=1e-4)
    for step in range(4):
        one, two = (
            read_rollouts(tmp_path / name / "rollouts" / f"step_{step:05d}.parquet") for name in ("a", "b")
        )
        assert [(r.text, r.reward) for r in one] == [(r.text, r.reward) for r in two]


def test_what_fails_ahead_is_raised_where_it_is_asked_for(tmp_path: Path) -> None:
    class Maker:
        def make(self, step: int, threshold: float, done: float) -> Batch:
            if step == 1:
                raise FewstepError("no more")
            return Batch([], {}, threshold, done)

    batches = MadeAhead(Maker(), lambda state, version: {}, 1, 5)  # type: ignore[arg-type]
    batches.take(0, 0.9, 0.0)
    with pytest.raises(FewstepError, match="no more"):
        batches.take(1, 0.9, 0.2)
    batches.close()


def test_looks_keep_the_best_weights_and_set_the_bar_once(tmp_path: Path) -> None:
    checks = {"every": 2, "num_tasks": 6, "max_drop": 0.5}
    trainer, progress, tracker = run(tmp_path, shift=1e-4, held_out_checks=checks)
    standing = progress.standing
    assert standing.bar is not None
    assert 0.0 <= standing.bar <= 0.5
    assert standing.looked_at == 4
    looks = [row for row in progress.history if "held_out/pass_at_1" in row]
    assert [row["step"] for row in looks] == [2, 4]
    best = min(looks, key=lambda row: (row["held_out/forwards_per_answer"], -row["held_out/pass_at_1"]))
    assert (standing.best_step, standing.best_forwards) == (
        best["step"],
        best["held_out/forwards_per_answer"],
    )
    kept = load_state(
        best_folder(tmp_path / BEST, standing.best_step), load_model(embedded_model())[0].config
    )
    # A checkpoint before the last look may name what looked best before it, until the next one is written.
    assert sorted(path.name for path in (tmp_path / BEST).iterdir()) == [
        f"step_{row['step']:05d}" for row in looks if row["held_out/best_step"] == row["step"]
    ]
    keep_best(tmp_path / BEST, standing)
    assert list((tmp_path / BEST).iterdir()) == [best_folder(tmp_path / BEST, standing.best_step)]
    if standing.best_step == 4:
        assert all(torch.equal(kept[name], tensor) for name, tensor in trainer.state().items())
    assert [step for step, _ in tracker.metrics["held_out/pass_at_1"]] == [2, 4]


def test_a_run_that_has_lost_its_quality_ends(tmp_path: Path) -> None:
    """Noise on every weight ruins the model at once: each look is a loss, and the second ends the run."""
    checks = {"every": 1, "num_tasks": 6, "max_drop": 0.0, "patience": 2}
    _, progress, _ = run(tmp_path, shift=0.5, steps=6, held_out_checks=checks)
    assert progress.standing.losses == 2
    assert progress.step in (2, 3)  # a first step without a right answer trains nothing
    assert "2 looks in a row" in progress.stopped
    assert not (tmp_path / BEST).exists() or progress.standing.best_step >= 1


def test_the_threshold_waits_for_held_out_quality_only_if_told_to() -> None:
    for gated, expected in ((False, 0.88), (True, 0.9)):
        config = RefineConfig.model_validate({"held_out_checks": {"every": 1, "gates_curriculum": gated}})
        progress = Progress(threshold=0.9, standing=Standing(holds=False))
        advance(config, progress, {"reward/pass_rate": 1.0}, seconds=1.0)
        assert progress.threshold == pytest.approx(expected)


@pytest.mark.parametrize(
    ("objective", "asked"),
    [
        (Distill(), []),
        (Seed(kl=0.1), ["reference"]),
        (Trace(kl=0.0, min_pass_rate=0.0, max_pass_rate=1.0), []),
        (Trace(kl=0.1, mismatch_bound=2.0, min_pass_rate=0.0, max_pass_rate=1.0), ["current", "reference"]),
        (Trace(kl=0.0, shrink=2, min_pass_rate=0.0, max_pass_rate=1.0), ["current"]),
        (Coupled(kl=0.1), ["current", "reference"]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "+".join(value) or "nothing",
)
def test_the_trainer_is_asked_for_what_no_rollout_recorded(
    tmp_path: Path, objective: RefineObjective, asked: list[LogprobSource]
) -> None:
    # Many short attempts at a low threshold: some of a group fail, so that there is something to learn.
    trainer, _, _ = run(
        tmp_path, objective, steps=1, prompts_per_step=8, group_size=4, temperature=1.5, curriculum={"start": 0.2, "end": 0.1}
    )  # fmt: skip
    assert len(trainer.batches) == 1
    assert trainer.asked == asked
    for sample in trainer.batches[0]:
        if "current" in asked:
            assert (sample.extras["old_logprob"] == -1.0).all()
        if "reference" in asked:
            assert (sample.extras["reference_logprob"] == -float(len(asked))).all()
        recorded = sample.extras.get("rollout_logprob")
        assert (recorded is not None) == getattr(objective, "corrects_mismatch", False)


def test_a_verifier_that_keeps_failing_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        FewstepError, match=r"rollouts: the verifier itself failed on \d+ of 6 answers.*AlwaysBroken"
    ):
        run(tmp_path, verifier=f"{__name__}:AlwaysBroken", steps=1)


def test_a_broken_verifier_is_no_bar(tmp_path: Path) -> None:
    checks = {"every": 1, "num_tasks": 6}
    with pytest.raises(
        FewstepError, match=r"held-out tasks.*: the verifier itself failed on \d of 6 answers"
    ):
        run(tmp_path, verifier=f"{__name__}:AlwaysBroken", steps=1, held_out_checks=checks)
    assert not (tmp_path / "rollouts").exists()


class AlwaysBroken:
    """A judge with a bug."""

    def unfit(self, task: Any) -> str:
        return ""

    def judge(self, task: Any, answer: str, sandbox: Any) -> Any:
        raise ZeroDivisionError("bug")
