"""From a checked body to engine requests and back; knows neither HTTP nor Ray."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from openai.types import CompletionUsage
from openai.types import Model as ModelEntry
from tokenizers import Tokenizer

from fewstep.actors.engine.host import EngineHost
from fewstep.actors.engine.request import Request, Update
from fewstep.actors.serving.answers import (
    Answer,
    Tally,
    mean_logprob,
    token_logprobs,
    trajectory_record,
)
from fewstep.actors.serving.canvas_events import canvas_fields, whole_text
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.desk import admitted
from fewstep.actors.serving.prompts import Prompt, Prompts
from fewstep.actors.serving.schema import ChatBody, CompletionBody, TokenizeBody, policy_for
from fewstep.actors.serving.stream import DONE, event, merge
from fewstep.actors.serving.wire import (
    ChatWire,
    CompletionWire,
    Envelope,
    Piece,
    Wire,
    finish_of,
    usage_of,
)
from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import RequestError
from fewstep.platform.records import DecodePolicy, Trajectory
from fewstep.platform.rng import derive_seed


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""


@dataclass(frozen=True)
class ServedModel:
    """The model behind a service.

    Attributes:
        name: what clients pass as `model`.
        created: Unix time of the weights, in seconds.
        policy: decode policy of requests that do not say; its seed is never used.
        max_tokens: of one answer when the request does not say; less where the context ends earlier.
    """

    name: str
    created: int
    config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatTemplate
    policy: DecodePolicy
    max_tokens: int


@dataclass(frozen=True)
class Call:
    """One HTTP request as engine requests, prompt by prompt, `body.num_tries` each, of which `body.n` become choices.

    Attributes:
        prompts: of each request.
        num_prompt_tokens: of all prompts and suffixes, each counted once.
        started: `time.monotonic()` when it was planned.
    """

    wire: Wire
    envelope: Envelope
    body: CompletionBody | ChatBody
    requests: tuple[Request, ...]
    prompts: tuple[Prompt, ...]
    num_prompt_tokens: int
    started: float


@dataclass(frozen=True)
class Origin:
    """Where the weights of a service are from, and what became of the last attempt to change them.

    Attributes:
        address: `models:/NAME/VERSION`, or a folder; with an adapter its folder.
        refused: the version that could not, and why; empty = none since the last swap.
        parent: the model under the adapter, by name; empty where there is no adapter.
    """

    address: str = ""
    refused: str = ""
    parent: str = ""


class CompletionService:
    """Answers calls with one engine.

    Attributes:
        model, origin: replaced when the weights are.
    """

    def __init__(self, host: EngineHost, model: ServedModel, origin: Origin = Origin()) -> None:
        self.host, self.model, self.origin = host, model, origin
        self._prompts = Prompts(model.config, model.tokenizer, model.chat, model.max_tokens)

    def entry(self) -> ModelEntry:
        """The model as /v1/models lists it; `root` and `parent` are what vLLM's are."""
        entry = {
            "id": self.model.name,
            "created": self.model.created,
            "object": "model",
            "owned_by": "fewstep",
        }
        lineage = {"root": self.origin.address or self.model.name, "parent": self.origin.parent or None}
        return ModelEntry.model_validate({**entry, **lineage})

    def plan(self, body: CompletionBody | ChatBody) -> Call:
        """The engine requests behind a body.

        Without a seed a fresh one is drawn. Choice 0 has the request's own seed and choice i > 0 one derived
        from it, so that asking for more choices leaves the first ones as they were.

        Raises:
            RequestError: what this model cannot serve, by field.
        """
        started = time.monotonic()
        wire: Wire = ChatWire() if isinstance(body, ChatBody) else CompletionWire()
        prompts = self._prompts.of(body)
        name = wire.id_prefix + secrets.token_hex(12)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        requests: list[Request] = []
        for prompt in prompts:
            for choice in range(body.num_tries):
                policy = policy_for(body, self.model.policy, derive_seed(seed, choice) if choice else seed)
                requests.append(
                    Request(
                        f"{name}-{len(requests)}",
                        prompt.ids,
                        policy,
                        prompt.max_tokens,
                        (*body.stops, *prompt.stop),
                        suffix_ids=prompt.suffix_ids,
                        watch=body.diffusing,
                        priority=body.fewstep.priority,
                    )
                )
        fingerprint = str(self.host.stats()["weight_version"])
        envelope = Envelope(name, int(time.time()), self.model.name, fingerprint, body.include_usage)
        of_request = tuple(prompt for prompt in prompts for _ in range(body.num_tries))
        num_tokens = sum(prompt.num_tokens for prompt in prompts)
        return Call(wire, envelope, body, tuple(requests), of_request, num_tokens, started)

    def start(self, call: Call) -> AsyncGenerator[tuple[int, Update]]:
        """Updates of all choices of a call; closing it aborts what is left.

        Raises:
            RequestError: at once, for a request the model cannot serve.
            QueueFull: at once, from a desk before which too many wait.
        """
        try:
            return merge(admitted(self.model.name, self.host, call.requests, call.body.user or ""))
        except RequestError as error:
            if error.field == "prompt" and isinstance(call.body, ChatBody):
                raise RequestError("messages", error.got, error.allowed, error.fix) from error
            raise

    def token_ids(self, body: TokenizeBody) -> tuple[int, ...]:
        """The prompt's ids, as a completion or a chat would see them."""
        if body.messages is not None:
            return self._prompts.chat_ids(body.messages)
        assert body.prompt is not None
        return self._prompts.text_ids(body.prompt)

    async def whole(self, call: Call, updates: AsyncGenerator[tuple[int, Update]]) -> str:
        """The whole answer as JSON text.

        Raises:
            GenerationFailed, ActorDied: a choice could not be finished.
        """
        tally = self._tally(call)
        async with aclosing(updates):
            async for index, update in updates:
                tally.add(index, update)
        answers = [self._answer(call, tally, index) for index in _chosen(call, tally)]
        return call.wire.whole(call.envelope, answers, self._settle(call, tally))

    async def events(self, call: Call, updates: AsyncGenerator[tuple[int, Update]]) -> AsyncGenerator[bytes]:
        """The answer as server-sent events (docs/serving.md, Streams), usage last if asked for.

        Raises:
            GenerationFailed, ActorDied: a choice could not be finished.
        """
        wire, envelope, tally = call.wire, call.envelope, self._tally(call)
        pieces = self._whole_pieces if call.body.fewstep.canvas == "whole_text" else self._pieces
        async with aclosing(updates):
            for index, prompt in enumerate(call.prompts):
                opening = wire.opening(envelope, index)
                if opening is not None:
                    yield event(opening)
                if prompt.opening and pieces == self._pieces:
                    yield event(wire.piece(envelope, index, Piece(prompt.opening)))
            async for index, update in updates:
                tally.add(index, update)
                for piece in pieces(call, tally, index, update):
                    yield event(wire.piece(envelope, index, piece))
        usage = self._settle(call, tally)
        if envelope.usage_follows:
            yield event(wire.usage(envelope, usage))
        yield DONE

    def _pieces(self, call: Call, tally: Tally, index: int, update: Update) -> Iterator[Piece]:
        """The canvas, if it is watched, then text that is final, then the end."""
        if update.canvas is not None:
            yield Piece(canvas=canvas_fields(self.model.tokenizer, update.canvas))
        text, prompt = update.text, call.prompts[index]
        if update.trajectory is not None:
            text += prompt.closing
        if text:
            yield Piece(text)
        if update.trajectory is not None:
            yield Piece("", finish_of(update.trajectory), answer=self._answer(call, tally, index))

    def _whole_pieces(self, call: Call, tally: Tally, index: int, update: Update) -> Iterator[Piece]:
        """The whole text as it is now; the last one final."""
        prompt = call.prompts[index]
        if update.trajectory is not None:
            answer = self._answer(call, tally, index)
            yield Piece(answer.text, finish_of(update.trajectory), _revision(update), answer)
        elif update.canvas is not None:
            text = whole_text(self.model.tokenizer, update.canvas, call.requests[index].stop)
            yield Piece(prompt.opening + text, canvas=_revision(update))

    def _tally(self, call: Call) -> Tally:
        return Tally(call.requests, self.model.config, call.started)

    def _answer(self, call: Call, tally: Tally, index: int) -> Answer:
        prompt, trajectory, body = call.prompts[index], tally.ended[index], call.body
        logprobs = token_logprobs(self.model.tokenizer, trajectory) if body.wants_logprobs else None
        record = trajectory_record(trajectory) if body.fewstep.return_trajectory else None
        text = prompt.opening + tally.texts[index] + prompt.closing
        return Answer(text, trajectory, logprobs, record)

    @staticmethod
    def _settle(call: Call, tally: Tally) -> CompletionUsage:
        return usage_of(call.num_prompt_tokens, list(tally.ended.values()), tally.first_block_s)


def _chosen(call: Call, tally: Tally) -> list[int]:
    """Requests that become choices: of each prompt's tries the most probable ones, the likeliest first."""
    tries, kept = call.body.num_tries, call.body.n
    if tries == kept:
        return list(range(len(call.requests)))

    def rank(index: int) -> tuple[float, int]:
        trajectory: Trajectory = tally.ended[index]
        return -mean_logprob(trajectory), index

    return [
        index
        for first in range(0, len(call.requests), tries)
        for index in sorted(range(first, first + tries), key=rank)[:kept]
    ]


def _revision(update: Update) -> dict[str, int] | None:
    return None if update.canvas is None else {"revision": update.canvas.revision}


def created_of(folder: Path) -> int:
    """Unix time of a model folder's weights, in seconds."""
    return int(max(path.stat().st_mtime for path in folder.glob("*.safetensors")))
