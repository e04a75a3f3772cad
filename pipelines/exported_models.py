"""A run's checkpoints as model folders: the newest few stay on disk, each one is a logged model with its metrics."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from fewstep.kernels.model.checkpoint import save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.publish import log_checkpoint
from fewstep.platform.records import DecodePolicy
from fewstep.platform.tracking import Tracker

# Means over the steps since the checkpoint before: a single step's rollouts are a noisy sample.
_LINKED = {
    "reward/pass_rate": "checkpoint/pass_rate",
    "rollout/forwards_per_answer": "checkpoint/forwards_per_answer",
    "rollout/tokens_per_forward": "checkpoint/tokens_per_forward",
}


class ExportedModels:
    """The folder `models/` of a run.

    Args:
        folder: where `step_00020` and so on go.
        keep: how many stay.
        name: of the logged models.
        example: a prompt.
        source: the folder the model came from, whose other files are kept.
    """

    def __init__(
        self, folder: Path, keep: int, tracker: Tracker, model: ModelConfig, tokenizer: Tokenizer, *, name: str,
        example: str, source: Path | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._keep, self._tracker = folder, keep, tracker
        self._model, self._tokenizer, self._name, self._example = model, tokenizer, name, example
        self._source = source

    def add(
        self,
        state: Mapping[str, torch.Tensor],
        step: int,
        policy: DecodePolicy,
        history: Sequence[Mapping[str, float]],
    ) -> None:
        """Writes one model folder, logs it, and removes those that are too many. A step that is there is left alone.

        Args:
            state: the weights.
            step: training steps done.
            policy: what the sampler used last.
            history: one row of metrics a step.
        Raises:
            ResourceError: the disk is full.
        """
        target = self._folder / f"step_{step:05d}"
        if target.is_dir():
            return
        before = max((number for number in self._steps() if number < step), default=0)
        save_model(target, state, self._model, self._tokenizer, self._source)
        rows = [row for row in history if before < row["step"] <= step]
        metrics = {
            name: sum(row[key] for row in rows) / len(rows)
            for key, name in _LINKED.items()
            if rows and key in rows[0]
        }
        log_checkpoint(
            self._tracker, target, name=f"{self._name}-checkpoint", metrics=metrics, input_example=self._example,
            policy=policy.model_copy(update={"temperature": 0.0}), step=step,
        )  # fmt: skip
        for number in self._steps()[: -self._keep]:
            shutil.rmtree(self._folder / f"step_{number:05d}", ignore_errors=True)

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self._folder.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)
