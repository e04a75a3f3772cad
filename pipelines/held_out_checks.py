"""Looks at held-out tasks while a model is refined: the bar it must hold, the best weights so far, and when to stop."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fewstep.actors.trainer_rank import Metrics
from fewstep.kernels.model.checkpoint import save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.adapters import ADAPTER
from fewstep.pipelines.frontier import SEQUENTIAL, Generate, Verify, answer, reaches, summarise
from fewstep.pipelines.rollouts import State, rollout_policy
from fewstep.pipelines.settings import RefineConfig
from fewstep.pipelines.task_source import TaskSource
from fewstep.platform.records import DecodePolicy, FrontierPoint
from fewstep.platform.rng import derive_seed


@dataclass
class Standing:
    """What the looks so far came to.

    Attributes:
        bar: pass@1 below which a look is a loss; None before the first look.
        looked_at: step of the last look; 0 = there was none.
        holds: the last look was no loss.
        losses: how many in a row were.
        best_step: the step whose weights are kept; -1 = none yet.
        best_forwards, best_pass_at_1: what they came to.
    """

    bar: float | None = None
    looked_at: int = 0
    holds: bool = True
    losses: int = 0
    best_step: int = -1
    best_forwards: float = float("inf")
    best_pass_at_1: float = 0.0


def best_folder(folder: Path, step: int) -> Path:
    """The model that looked best as of a step."""
    return folder / f"step_{step:05d}"


def keep_best(folder: Path, standing: Standing) -> None:
    """Removes what looked best before; called once a checkpoint that no longer names it is written."""
    for path in folder.glob("step_*"):
        if path != best_folder(folder, standing.best_step):
            shutil.rmtree(path, ignore_errors=True)


class HeldOutChecks:
    """Asks the replicas' model the watched tasks, greedily, at the threshold of the rollouts.

    Args:
        folder: where the best weights are kept, as a model a step: a checkpoint that is gone back to names an earlier one.
        keep_adapter: writes the adapter in those weights into a folder, if one is trained.
    """

    def __init__(
        self, config: RefineConfig, source: TaskSource, model: ModelConfig, tokenizer: Tokenizer, generate: Generate,
        verify: Verify, folder: Path, keep_adapter: Callable[[Path], None],
    ) -> None:  # fmt: skip
        self._config, self._source, self._model, self._tokenizer = config, source, model, tokenizer
        self._generate, self._verify, self._folder = generate, verify, folder
        self._keep_adapter = keep_adapter

    def due(self, standing: Standing, step: int, *, last: bool = False) -> bool:
        """Whether a look follows a step: every so many, and the last."""
        every = self._config.held_out_checks.every
        return every > 0 and standing.looked_at < step and (last or step % every == 0)

    def set_bar(self, standing: Standing) -> None:
        """Measure the unrefined model at one token per step, once a run."""
        if self._config.held_out_checks.every and standing.bar is None:
            point = self._measure(SEQUENTIAL)
            standing.bar = max(0.0, point.pass_at_1 - self._config.held_out_checks.max_drop)

    def look(self, standing: Standing, step: int, threshold: float, state: State) -> Metrics:
        """One look; keeps the weights if they are the best so far.

        Best is the fewest forwards per answer among looks that hold the bar, then the higher pass@1.

        Args:
            state: the weights that are looked at, those the trainer holds.
        Raises:
            FewstepError: the verifier itself failed too often; that is no loss of quality.
        """
        policy = rollout_policy(self._config, threshold).model_copy(update={"temperature": 0.0})
        point = self._measure(policy)
        standing.looked_at = step
        standing.holds = standing.bar is None or reaches(point.pass_at_1, standing.bar)
        standing.losses = 0 if standing.holds else standing.losses + 1
        rank = (point.forwards_per_answer, -point.pass_at_1)
        if standing.holds and rank < (standing.best_forwards, -standing.best_pass_at_1):
            standing.best_step, standing.best_forwards = step, point.forwards_per_answer
            standing.best_pass_at_1 = point.pass_at_1
            save_model(best_folder(self._folder, step), dict(state), self._model, self._tokenizer)
            self._keep_adapter(best_folder(self._folder, step) / ADAPTER)
        return {
            "held_out/pass_at_1": point.pass_at_1,
            "held_out/forwards_per_answer": point.forwards_per_answer,
            "held_out/tokens_per_forward": point.tokens_per_forward,
            "held_out/bar": standing.bar or 0.0,
            "held_out/best_step": float(standing.best_step),
        }

    def given_up(self, standing: Standing) -> bool:
        """Whether the run has lost its quality for good."""
        patience = self._config.held_out_checks.patience
        return patience > 0 and standing.losses >= patience

    def _measure(self, policy: DecodePolicy) -> FrontierPoint:
        asked = self._source.watched
        requests = [
            one.request(
                str(index),
                policy.model_copy(update={"seed": derive_seed("held-out-look", one.task.task_id)}),
            )
            for index, one in enumerate(asked)
        ]
        found = answer(
            [one.task for one in asked], requests, self._generate, self._verify, self._tokenizer,
            self._source.answers, what="held-out tasks looked at",
        )  # fmt: skip
        return summarise(policy, found.trajectories, found.verdicts, found.seconds)
