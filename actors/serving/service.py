"""From a checked body to engine requests and back; knows neither HTTP nor Ray."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from openai.types import CompletionUsage
from openai.types import Model as ModelEntry
from tokenizers import Tokenizer

from fewstep.actors.engine.host import EngineHost
from fewstep.actors.engine.request import Request, Update, context_length
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.desk import admitted
from fewstep.actors.serving.schema import ChatBody, CompletionBody, policy_for
from fewstep.actors.serving.stream import DONE, event, merge
from fewstep.actors.serving.wire import Answer, ChatWire, CompletionWire, Envelope, Wire, finish_of, usage_of
from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import FewstepError, RequestError
from fewstep.platform.records import DecodePolicy, Trajectory
from fewstep.platform.rng import derive_seed


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""


class GenerationFailed(FewstepError):
    """The engine could not finish a request; the message is its reason."""


@dataclass(frozen=True)
class ServedModel:
    """What a server offers and how it decodes by default.

    Attributes:
        name: what clients pass as `model`.
        created: Unix time of the weights, in seconds.
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
    """One HTTP request as engine requests, in the order of the answer's choices: prompt by prompt, n each."""

    wire: Wire
    envelope: Envelope
    requests: tuple[Request, ...]
    num_prompt_tokens: int
    user: str


class CompletionService:
    """Answers calls with one engine."""

    def __init__(self, host: EngineHost, model: ServedModel) -> None:
        self.host, self.model = host, model

    def entry(self) -> ModelEntry:
        """The model as /v1/models lists it."""
        return ModelEntry(id=self.model.name, created=self.model.created, object="model", owned_by="fewstep")

    def check_model(self, name: str) -> None:
        """Raise a ModelNotFound unless `name` is the model served here."""
        if name != self.model.name:
            raise ModelNotFound("model", repr(name), repr(self.model.name), "ask for the model served here")

    def plan(self, body: CompletionBody | ChatBody) -> Call:
        """The engine requests behind a body.

        Without a seed a fresh one is drawn. Choice 0 has the request's own seed and choice i > 0 one derived
        from it, so that asking for more choices leaves the first ones as they were.

        Raises:
            RequestError: what this model cannot serve, by field.
        """
        self.check_model(body.model)
        wire: Wire = ChatWire() if isinstance(body, ChatBody) else CompletionWire()
        prompts = self._prompts(body)
        name = wire.id_prefix + secrets.token_hex(12)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        requests: list[Request] = []
        for prompt in prompts:
            for choice in range(body.n):
                policy = policy_for(body, self.model.policy, derive_seed(seed, choice) if choice else seed)
                limit = self._limit(prompt) if body.token_limit is None else body.token_limit
                requests.append(Request(f"{name}-{len(requests)}", prompt, policy, limit, body.stops))
        fingerprint = str(self.host.stats()["weight_version"])
        envelope = Envelope(name, int(time.time()), self.model.name, fingerprint, body.include_usage)
        return Call(wire, envelope, tuple(requests), sum(map(len, prompts)), body.user)

    def start(self, call: Call) -> AsyncGenerator[tuple[int, Update]]:
        """Updates of all choices of a call; closing it aborts what is left.

        Raises:
            RequestError: at once, for a request the model cannot serve.
            QueueFull: at once, from a desk before which too many wait.
        """
        return merge(admitted(self.model.name, self.host, call.requests, call.user))

    async def whole(self, call: Call, updates: AsyncGenerator[tuple[int, Update]]) -> str:
        """The whole answer as JSON text.

        Raises:
            GenerationFailed, ActorDied: a choice could not be finished.
        """
        texts: list[list[str]] = [[] for _ in call.requests]
        ended: dict[int, Trajectory] = {}
        async with aclosing(updates):
            async for index, update in updates:
                texts[index].append(update.text)
                self._note_end(index, update, ended)
        answers = [Answer("".join(text), ended[index]) for index, text in enumerate(texts)]
        return call.wire.whole(call.envelope, answers, self._settle(call, ended))

    async def events(self, call: Call, updates: AsyncGenerator[tuple[int, Update]]) -> AsyncGenerator[bytes]:
        """The answer as server-sent events of committed text, usage last if asked for.

        Raises:
            GenerationFailed, ActorDied: a choice could not be finished.
        """
        wire, envelope = call.wire, call.envelope
        ended: dict[int, Trajectory] = {}
        async with aclosing(updates):
            for index in range(len(call.requests)):
                opening = wire.opening(envelope, index)
                if opening is not None:
                    yield event(opening)
            async for index, update in updates:
                self._note_end(index, update, ended)
                if update.text:
                    yield event(wire.piece(envelope, index, update.text, None))
                if update.trajectory is not None:
                    yield event(wire.piece(envelope, index, "", finish_of(update.trajectory)))
        usage = self._settle(call, ended)
        if envelope.usage_follows:
            yield event(wire.usage(envelope, usage))
        yield DONE

    def _prompts(self, body: CompletionBody | ChatBody) -> list[tuple[int, ...]]:
        tokenizer, chat = self.model.tokenizer, self.model.chat
        if isinstance(body, ChatBody):
            text = chat.render(body.messages)
            return [tuple(tokenizer.encode(text, add_special_tokens=not chat.templated).ids)]
        if not body.prompts:
            raise RequestError("prompt", "an empty list", "at least one prompt", "send a prompt")
        return [
            tuple(tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt)
            for prompt in body.prompts
        ]

    def _limit(self, prompt: Sequence[int]) -> int:
        # At least 1: a prompt that fills the context is then refused by the engine, which says why.
        return max(1, min(self.model.max_tokens, context_length(self.model.config) - len(prompt)))

    @staticmethod
    def _note_end(index: int, update: Update, ended: dict[int, Trajectory]) -> None:
        if update.error is not None:
            raise GenerationFailed(f"choice {index}: {update.error}")
        if update.trajectory is not None:
            ended[index] = update.trajectory

    @staticmethod
    def _settle(call: Call, ended: dict[int, Trajectory]) -> CompletionUsage:
        return usage_of(call.num_prompt_tokens, list(ended.values()))


def created_of(folder: Path) -> int:
    """Unix time of a model folder's weights, in seconds."""
    return int((folder / "model.safetensors").stat().st_mtime)
