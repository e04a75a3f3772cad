"""The autoregressive baseline of an evaluation: the same tasks, prompts, stop rules, readings and sandbox, one token a forward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.actors.autoregressive import AutoregressiveModel
from fewstep.actors.engine.request import Request
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.pipelines.evaluation import Contender
from fewstep.pipelines.evaluation_settings import BASELINE_MARK
from fewstep.platform.artifacts import weights_digest

SLOT = "baseline"


@dataclass(frozen=True)
class Baseline(Contender):
    """A loaded autoregressive model."""

    engine: AutoregressiveModel

    def check(self, request: Request) -> None:
        self.engine.check(request)


def open_baseline(folder: Path, max_sequences: int) -> Baseline:
    """Loads it.

    Raises:
        ResourceError: `transformers` is not installed.
        CheckpointError: no model that it knows.
    """
    engine = AutoregressiveModel(folder, max_sequences)
    return Baseline(
        address=f"{folder} {BASELINE_MARK}",
        pinned=str(folder),
        folder=folder,
        weights_sha256=weights_digest(folder),
        slot=SLOT,
        tokenizer=engine.tokenizer,
        chat=ChatTemplate(folder),
        engine=engine,
    )
