"""An autoregressive model answering through Hugging Face's `transformers`: what a diffusion model is held against.

One token a forward and sequence, keys and values cached, sequences of about equal length together. Needs the extra
`baseline` (`pip install 'fewstep[baseline]'`). The modelling code is the library's; none of a checkpoint's own runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from fewstep.actors.engine.request import Request
from fewstep.actors.engine.text import TextStream
from fewstep.kernels.model.tokenizer_file import read_tokenizer
from fewstep.platform.errors import CheckpointError, RequestError, ResourceError
from fewstep.platform.records import FinishReason, Trajectory
from fewstep.platform.rng import generator

_PAD = 0  # in rows on the left of a shorter prompt; attention leaves them out


class AutoregressiveModel:
    """A causal language model of Hugging Face's layout, loaded.

    Args:
        folder: config.json, safetensors, tokenizer.json.
        max_sequences: sequences that share a forward.
    Raises:
        ResourceError: `transformers` is not installed.
        CheckpointError: the folder is not such a model, or names tensors the library's class has not got.
    """

    def __init__(self, folder: Path, max_sequences: int = 48) -> None:
        self._max_sequences = max_sequences
        self.tokenizer = read_tokenizer(folder)
        self._model = _load(folder)
        self.context_tokens = int(
            getattr(self._model.config.get_text_config(), "max_position_embeddings", 1 << 30)
        )
        self._end_ids = _end_ids(self._model)

    def generate(self, requests: Sequence[Request]) -> list[Trajectory]:
        """Answers in the order of the requests; a function of (weights, prompt, policy.temperature, top_p, seed).

        Every trajectory says one token a forward. Confidence and log-probability are NaN: the library keeps neither.
        """
        order = sorted(range(len(requests)), key=lambda number: len(requests[number].prompt_ids))
        answers: dict[int, Trajectory] = {}
        for start in range(0, len(order), self._max_sequences):
            batch = order[start : start + self._max_sequences]
            answers |= zip(batch, self._batch([requests[number] for number in batch]), strict=True)
        return [answers[number] for number in range(len(requests))]

    def check(self, request: Request) -> None:
        """Raises RequestError where the model's context is too short, or for infill, which it cannot do."""
        asked = len(request.prompt_ids) + request.max_tokens
        if request.suffix_ids:
            raise RequestError("suffix", "a suffix", "none", "an autoregressive model continues text")
        if asked > self.context_tokens:
            raise RequestError(
                "max_tokens", f"{asked} tokens", f"at most {self.context_tokens}", "lower max_tokens"
            )

    def _batch(self, requests: Sequence[Request]) -> list[Trajectory]:
        longest = max(len(request.prompt_ids) for request in requests)
        pads = [longest - len(request.prompt_ids) for request in requests]
        ids = [[_PAD] * pad + list(request.prompt_ids) for pad, request in zip(pads, requests, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        sequences = [_Sequence(request, self.tokenizer, self._end_ids) for request in requests]
        device = self._model.device
        settings = _transformers().GenerationConfig(
            max_new_tokens=max(request.max_tokens for request in requests), do_sample=False, pad_token_id=_PAD,
            eos_token_id=None,
        )  # fmt: skip
        with torch.inference_mode():
            self._model.generate(
                torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
                logits_processor=[_keyed_draws(sequences)],
                stopping_criteria=[_stop(sequences)],
            )
        return [sequence.trajectory() for sequence in sequences]


class _Sequence:
    """What one request has been given so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        self.request = request
        self._stream = TextStream(tokenizer, request.stop)
        self._end_ids = end_ids | set(request.stop_ids)
        self._ids: list[int] = []
        self._num_tokens = 0
        self._reason: FinishReason | None = None

    @property
    def done(self) -> bool:
        """Whether what follows is not this request's."""
        return self._reason is not None

    def take(self, token: int) -> None:
        """The next token."""
        if self.done:
            return
        self._ids.append(token)
        ended = token in self._end_ids
        full = len(self._ids) == self.request.max_tokens
        piece = self._stream.feed(self._ids[:-1] if ended else self._ids, len(self._ids), ended or full)
        self._num_tokens = piece.num_tokens if piece.stopped else len(self._ids)
        if piece.stopped or ended:
            self._reason = "stop"
        elif full:
            self._reason = "length"

    def draw(self, logits: torch.Tensor) -> int:
        """A token of [V] by the request's policy, keyed by (seed, position)."""
        policy = self.request.policy
        if policy.temperature == 0.0:
            return int(logits.argmax())
        weight = (logits.double() / policy.temperature).softmax(-1)
        ordered, index = weight.sort(descending=True, stable=True)
        ordered *= (ordered.cumsum(-1) - ordered) < policy.top_p
        cumulative = ordered.cumsum(-1)
        uniform = generator("autoregressive", policy.seed, len(self._ids)).random()
        place = int((cumulative <= uniform * cumulative[-1]).sum())
        return int(index[min(place, len(index) - 1)])

    def trajectory(self) -> Trajectory:
        """The record: one token a forward, in order."""
        nothing = np.full(len(self._ids), np.nan, np.float32)
        return Trajectory(
            prompt_ids=np.array(self.request.prompt_ids, np.int32),
            canvas_ids=np.array(self._ids, np.int32),
            step_map=np.arange(len(self._ids), dtype=np.int16),
            confidence=nothing,
            logprob=nothing.copy(),
            num_tokens=self._num_tokens,
            forwards=len(self._ids),
            finish_reason=self._reason or "abort",
            policy=self.request.policy,
            seed=self.request.policy.seed,
            weight_version_first="",
            weight_version_last="",
        )


def _keyed_draws(sequences: Sequence[_Sequence]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A processor that leaves of each row's scores the token that was drawn: the library's own sampling reads torch's
    global generator, by which a batch's mix would change its answers."""

    def draw(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        for row, sequence in enumerate(sequences):
            only[row, _PAD if sequence.done else sequence.draw(scores[row])] = 0.0
        return only

    return draw


def _stop(sequences: Sequence[_Sequence]) -> Callable[..., torch.Tensor]:
    """A criterion that shows each sequence its new token, and ends the batch with the last of them."""

    def stop(ids: torch.Tensor, _scores: Any, **_settings: Any) -> torch.Tensor:
        for sequence, token in zip(sequences, ids[:, -1].tolist(), strict=True):
            sequence.take(token)
        return torch.tensor([sequence.done for sequence in sequences], device=ids.device)

    return stop


def _transformers() -> Any:
    """The library, of which few parts are typed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ResourceError(
            "baseline", "transformers is not installed", "Hugging Face's transformers, 5 or later",
            "pip install 'fewstep[baseline]'",
        ) from error  # fmt: skip


def _load(folder: Path) -> Any:
    transformers = _transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto",
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            str(folder),
            reason[0][:300],
            "a causal language model that transformers knows",
            "check the folder",
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found.get(what, ()))):
            raise CheckpointError(
                str(folder), f"{what.replace('_', ' ')}: {', '.join(names[:4])}", "the weights of its architecture",
                "copy the checkpoint again",
            )  # fmt: skip
    return model.eval()


def _end_ids(model: Any) -> frozenset[int]:
    """What ends an answer: generation_config.json's, else config.json's."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    found = model.config.get_text_config().eos_token_id if found is None else found
    return frozenset([found] if isinstance(found, int) else found or ())
