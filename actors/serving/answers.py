"""What is kept of a call while its answers come in: text, ends, and when the first block was there."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fewstep.actors.engine.request import Request, Update
from fewstep.actors.serving.canvas_events import piece_texts
from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import FewstepError
from fewstep.platform.records import Trajectory


class GenerationFailed(FewstepError):
    """The engine could not finish a request; the message is its reason."""


@dataclass(frozen=True)
class TokenLogprobs:
    """The tokens of an answer as texts, and the log-probability of each when it was written."""

    texts: tuple[str, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """One finished choice."""

    text: str
    trajectory: Trajectory
    logprobs: TokenLogprobs | None = None
    record: dict[str, Any] | None = None


class Tally:
    """Updates of a call's requests, added up.

    Args:
        config: of the model, whose blocks say when a request's first one is there.
        started: `time.monotonic()` when the call came in.

    Attributes:
        texts: of every request so far; ended: trajectories of those that ended.
        first_block_s: seconds from `started` to the first block of any request; None = not there yet.
    """

    def __init__(self, requests: Sequence[Request], config: ModelConfig, started: float) -> None:
        self._started = started
        # Positions of the first live block that belong to the answer; a bidirectional model's begins with it.
        aligned = config.attention_kind == "block_causal"
        self._left = [
            (request.policy.block_size or config.block_size)
            - aligned * (len(request.prompt_ids) % config.block_size)
            for request in requests
        ]
        self.texts = [""] * len(requests)
        self.ended: dict[int, Trajectory] = {}
        self.first_block_s: float | None = None

    def add(self, index: int, update: Update) -> None:
        """Take an update of request `index`.

        Raises:
            GenerationFailed: it says that the request failed.
        """
        if update.error is not None:
            raise GenerationFailed(f"choice {index}: {update.error}")
        self.texts[index] += update.text
        self._left[index] -= update.num_new_tokens
        if update.trajectory is not None:
            self.ended[index] = update.trajectory
        if self.first_block_s is None and (self._left[index] <= 0 or update.last):
            self.first_block_s = time.monotonic() - self._started


def token_logprobs(tokenizer: Tokenizer, trajectory: Trajectory) -> TokenLogprobs:
    """Of the tokens that count."""
    count = trajectory.num_tokens
    texts = piece_texts(tokenizer, trajectory.canvas_ids[:count].tolist())
    return TokenLogprobs(tuple(texts), tuple(trajectory.logprob[:count].tolist()))


def mean_logprob(trajectory: Trajectory) -> float:
    """Mean log-probability of the tokens that count, by which `best_of` ranks; -inf for an answer without tokens."""
    chosen = trajectory.logprob[: trajectory.num_tokens]
    return float(np.mean(chosen)) if len(chosen) else -math.inf


def trajectory_record(trajectory: Trajectory) -> dict[str, Any]:
    """How an answer came to be, as the JSON object `choices[i].fewstep.trajectory`; positions count from the answer's start.

    Only tokens that count are in it. A log-probability is null where the model did not choose the token.
    """
    count = trajectory.num_tokens
    edits = zip(
        trajectory.edit_position.tolist(), trajectory.edit_step.tolist(), trajectory.edit_token.tolist(),
        _numbers(trajectory.edit_logprob), strict=True,
    )  # fmt: skip
    return {
        "token_ids": trajectory.canvas_ids[:count].tolist(),
        "step_map": trajectory.step_map[:count].tolist(),
        "logprobs": _numbers(trajectory.logprob[:count]),
        "confidences": _numbers(trajectory.confidence[:count]),
        "edits": [
            {"position": position, "step": step, "token_id": token, "logprob": logprob}
            for position, step, token, logprob in edits
            if position < count
        ],
        "forwards": trajectory.forwards,
        "policy": trajectory.policy.model_dump(mode="json"),
        "weight_version_first": trajectory.weight_version_first,
        "weight_version_last": trajectory.weight_version_last,
    }


def _numbers(values: NDArray[np.float32]) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
