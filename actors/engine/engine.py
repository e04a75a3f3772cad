"""The engine: requests join and leave between any two forwards; a step is one forward over all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from fewstep.actors.engine.decoding import Canvases, Outcome
from fewstep.actors.engine.request import Request, Update
from fewstep.actors.engine.text import TextStream, decode, find_stop
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import CheckpointError, RequestError
from fewstep.platform.records import FinishReason, Trajectory, WeightVersion


@dataclass
class _Sequence:
    """A running request: its slot and what Python has to remember between steps.

    `stream` is None where nobody reads along and no stop string asks for it: no text is made then.
    """

    request: Request
    slot: int
    first_version: WeightVersion
    stream: TextStream | None
    text_end: int
    num_tokens: int = 0
    forwards: int = 0


class Engine:
    """Denoises many requests together; each result depends on weights, prompt, policy and seed alone.

    Floating point limits that promise: a matrix product may round differently when it has more rows, so a
    confidence within about 1e-6 of a threshold, or two tokens that close, can fall the other way in another
    batch. Nothing else couples requests.

    Args:
        model: owned by the engine from here on; `load_weights` writes into it.
        max_sequences: requests that share a forward; further ones wait, first come first served.
        weight_version: which weights `model` holds now.

    Attributes:
        forwards, rows: forwards run and rows they had; committed_tokens: tokens of ended requests that count.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_sequences: int = 64,
        weight_version: WeightVersion,
    ) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        self.weight_version = weight_version
        self.forwards = self.committed_tokens = self.rows = 0
        self._canvases = Canvases(model.config, max_sequences, model.embed_tokens.weight.device)
        self._free = list(range(max_sequences - 1, -1, -1))
        self._waiting: deque[tuple[Request, bool]] = deque()
        self._running: dict[str, _Sequence] = {}
        self._ids: set[str] = set()

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether `step` would run a forward."""
        return bool(self._running or self._waiting)

    def add(self, request: Request) -> None:
        """Take a request; it joins at the next step that has a free slot.

        Raises:
            RequestError: names the field this model cannot serve, or an id that is in use.
        """
        self._add(request, streamed=True)

    def _add(self, request: Request, streamed: bool) -> None:
        request.validate(self.config)
        if request.request_id in self._ids:
            raise RequestError("request_id", request.request_id, "an id not in use", "choose another id")
        self._ids.add(request.request_id)
        self._waiting.append((request, streamed))

    def abort(self, request_id: str) -> Trajectory | None:
        """Drop a request and free its slot at once; an unknown id is one that has already ended.

        Returns:
            What it had got, with finish reason `abort`; None if it had not started.
        """
        self._ids.discard(request_id)
        self._waiting = deque(entry for entry in self._waiting if entry[0].request_id != request_id)
        sequence = self._running.get(request_id)
        if sequence is None:
            return None
        num_tokens = sequence.text_end - len(sequence.request.prompt_ids)
        trajectory = self._trajectory(sequence, self._live_end(sequence), num_tokens, "abort")
        self._release(sequence)
        return trajectory

    def load_weights(self, state: Mapping[str, torch.Tensor], version: WeightVersion) -> None:
        """Take new weights between two steps.

        Running requests keep what they have written; their cached keys and values are recomputed by their
        next forward, so no forward ever mixes two versions.

        Raises:
            CheckpointError: a tensor is missing, surplus or of another shape; the old weights stay whole.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        new = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if own != new:
            differing = sorted(name for name in own.keys() | new.keys() if own.get(name) != new.get(name))
            raise CheckpointError(
                f"weights {version}",
                f"a different {differing[0]}",
                "the engine's tensors",
                "push the same model",
            )
        self.model.load_state_dict(dict(state))
        self._canvases.forget_cache()
        self.weight_version = version

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One forward for every running request; updates of those for which something became final."""
        self._admit()
        if not self._running:
            return []
        running = list(self._running.values())
        layout = self._canvases.layout([sequence.slot for sequence in running])
        hidden = self.model(layout.tokens, layout.positions, layout.attention)[0]
        sampling = any(sequence.request.policy.temperature > 0 for sequence in running)
        outcomes = self._canvases.decide(layout, hidden, self.model, sampling)
        self.forwards += 1
        self.rows += layout.tokens.shape[1]
        updates = []
        for index, outcome in zip(layout.order, outcomes, strict=True):
            sequence = running[index]
            sequence.forwards += 1
            if outcome.finished or outcome.failed or outcome.text_end > sequence.text_end:
                update = self._settle(sequence, outcome)
                if update.last or update.text or update.num_new_tokens:
                    updates.append(update)
        return updates

    def generate(self, requests: Sequence[Request]) -> list[Trajectory]:
        """Run requests to their end; trajectories in request order.

        Raises:
            RequestError: a bad request, before any starts; or one that failed, after all others ended.
            RuntimeError: the engine is busy with other requests, whose updates would be lost.
        """
        if self.has_work:
            raise RuntimeError("generate needs an engine without other requests")
        try:
            for request in requests:
                self._add(request, streamed=False)
        except RequestError:
            self._waiting.clear()
            self._ids.clear()
            raise
        last: dict[str, Update] = {}
        while self.has_work:
            last.update((update.request_id, update) for update in self.step() if update.last)
        ended = [last[request.request_id] for request in requests]
        errors = [update for update in ended if update.error]
        if errors:
            raise RequestError(
                f"request {errors[0].request_id}", errors[0].error, "finite logits", "check the weights"
            )
        return [update.trajectory for update in ended if update.trajectory is not None]

    def text_of(self, trajectory: Trajectory, stop: Sequence[str] = ()) -> str:
        """The completion as text, without the end of sequence.

        Args:
            stop: the request's stop strings. A token that holds both the last characters of the text and the
                first of a stop string is not among the tokens that count; with `stop` its share is kept.
        """
        ids = trajectory.completion_ids.tolist()
        if stop and trajectory.finish_reason == "stop":
            written = trajectory.canvas_ids.tolist()
            unwritten = (trajectory.step_map < 0).tolist()
            ids = written[: unwritten.index(True)] if True in unwritten else written
        if self.config.eos_token_id in ids:
            ids = ids[: ids.index(self.config.eos_token_id)]
        text = decode(self.tokenizer, ids)
        return text[: find_stop(text, stop)]

    def _admit(self) -> None:
        while self._free and self._waiting:
            request, streamed = self._waiting.popleft()
            slot = self._free.pop()
            self._canvases.admit(slot, request)
            stream = TextStream(self.tokenizer, request.stop) if streamed or request.stop else None
            self._running[request.request_id] = _Sequence(
                request, slot, self.weight_version, stream, text_end=len(request.prompt_ids)
            )

    def _settle(self, sequence: _Sequence, outcome: Outcome) -> Update:
        """Text, token count and end of one sequence after a step that moved it."""
        name, prompt = sequence.request.request_id, len(sequence.request.prompt_ids)
        if outcome.failed:
            return self._fail(sequence, "the model's logits are not finite")
        sequence.text_end = outcome.text_end
        num_tokens = outcome.text_end - prompt + int(outcome.finished and outcome.eos)
        text, stopped = "", False
        if sequence.stream is not None:
            ids = self._canvases.tokens[sequence.slot, prompt : outcome.text_end].tolist()
            try:
                piece = sequence.stream.feed(ids, num_tokens, outcome.finished)
            except ValueError as error:
                return self._fail(sequence, str(error))
            text, num_tokens, stopped = piece.text, piece.num_tokens, piece.stopped
        num_new, sequence.num_tokens = num_tokens - sequence.num_tokens, num_tokens
        if not (outcome.finished or stopped):
            return Update(name, text, num_new)
        reason: FinishReason = "stop" if stopped or outcome.eos else "length"
        trajectory = self._trajectory(sequence, outcome.block_end, num_tokens, reason)
        self._release(sequence)
        return Update(name, text, num_new, trajectory)

    def _fail(self, sequence: _Sequence, error: str) -> Update:
        self._canvases.cache.wipe(sequence.slot)
        self._release(sequence)
        return Update(sequence.request.request_id, "", 0, error=error)

    def _release(self, sequence: _Sequence) -> None:
        self._free.append(sequence.slot)
        self._ids.discard(sequence.request.request_id)
        del self._running[sequence.request.request_id]

    def _live_end(self, sequence: _Sequence) -> int:
        return int(self._canvases.live[sequence.slot]) + self.config.block_size

    def _trajectory(self, sequence: _Sequence, end: int, num_tokens: int, reason: FinishReason) -> Trajectory:
        """The record of a sequence whose canvas reaches to absolute position `end`."""
        self.committed_tokens += num_tokens
        canvases, request = self._canvases, sequence.request
        canvas = (sequence.slot, slice(len(request.prompt_ids), end))
        tokens = canvases.tokens[sequence.slot, :end].to("cpu", torch.int32, copy=True).numpy()
        return Trajectory(
            prompt_ids=tokens[: len(request.prompt_ids)],
            canvas_ids=tokens[len(request.prompt_ids) :],
            step_map=canvases.step_map[canvas].to("cpu", copy=True).numpy(),
            confidence=canvases.confidence[canvas].to("cpu", copy=True).numpy(),
            logprob=canvases.logprob[canvas].to("cpu", copy=True).numpy(),
            num_tokens=num_tokens,
            forwards=sequence.forwards,
            finish_reason=reason,
            policy=request.policy,
            seed=request.policy.seed,
            weight_version_first=str(sequence.first_version),
            weight_version_last=str(self.weight_version),
        )
