"""Answers in OpenAI's shapes, built from the `openai` package's own types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from fewstep.platform.records import Trajectory

Finish = Literal["stop", "length"]


class _Usage(TypedDict, total=False):
    """The `usage` of one object: a count, null, or absent."""

    usage: CompletionUsage | None


@dataclass(frozen=True)
class Envelope:
    """What every object of one answer carries.

    Attributes:
        created: Unix time in seconds.
        fingerprint: the weight version, OpenAI's `system_fingerprint`.
        usage_follows: a stream that ends with a usage chunk says `usage: null` in all others.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    usage_follows: bool


@dataclass(frozen=True)
class Answer:
    """One finished choice."""

    text: str
    trajectory: Trajectory


def finish_of(trajectory: Trajectory) -> Finish:
    """OpenAI's finish reason; an aborted request has no reader to tell it to."""
    assert trajectory.finish_reason != "abort"
    return trajectory.finish_reason


def usage_of(num_prompt_tokens: int, trajectories: Sequence[Trajectory]) -> CompletionUsage:
    """Committed tokens only: masks, and what lies behind an end of sequence or a stop string, are not billed.

    `usage.fewstep` adds the forwards, summed over choices, and committed tokens per forward.
    """
    num_tokens = sum(trajectory.num_tokens for trajectory in trajectories)
    forwards = sum(trajectory.forwards for trajectory in trajectories)
    return CompletionUsage.model_validate(
        {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
            "fewstep": {"forwards": forwards, "tokens_per_forward": num_tokens / max(1, forwards)},
        }
    )


class Wire(Protocol):
    """The shapes of one endpoint: a whole answer, or the chunks of a stream, each as JSON text."""

    id_prefix: str

    def whole(self, envelope: Envelope, answers: Sequence[Answer], usage: CompletionUsage) -> str: ...

    def opening(self, envelope: Envelope, index: int) -> str | None:
        """The chunk that opens a choice, if the endpoint has one."""

    def piece(self, envelope: Envelope, index: int, text: str, finish: Finish | None) -> str:
        """Newly final text of a choice, or its end."""

    def usage(self, envelope: Envelope, usage: CompletionUsage) -> str: ...


class CompletionWire:
    """/v1/completions."""

    id_prefix = "cmpl-"

    def whole(self, envelope: Envelope, answers: Sequence[Answer], usage: CompletionUsage) -> str:
        choices = [
            CompletionChoice(
                index=index, text=answer.text, finish_reason=finish_of(answer.trajectory), logprobs=None
            )
            for index, answer in enumerate(answers)
        ]
        return self._json(envelope, choices, {"usage": usage})

    def opening(self, envelope: Envelope, index: int) -> str | None:
        return None

    def piece(self, envelope: Envelope, index: int, text: str, finish: Finish | None) -> str:
        # The package's type leaves out that a chunk's finish_reason is null until the last.
        choice = CompletionChoice.model_construct(index=index, text=text, finish_reason=finish, logprobs=None)
        return self._json(envelope, [choice], _no_usage_yet(envelope))

    def usage(self, envelope: Envelope, usage: CompletionUsage) -> str:
        return self._json(envelope, [], {"usage": usage})

    @staticmethod
    def _json(envelope: Envelope, choices: list[CompletionChoice], usage: _Usage) -> str:
        completion = Completion(
            id=envelope.id,
            object="text_completion",
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.fingerprint,
            choices=choices,
            **usage,
        )
        return completion.model_dump_json(exclude_unset=True, warnings=False)


class ChatWire:
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"

    def whole(self, envelope: Envelope, answers: Sequence[Answer], usage: CompletionUsage) -> str:
        choices = [
            ChatChoice(
                index=index,
                message=ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
                finish_reason=finish_of(answer.trajectory),
                logprobs=None,
            )
            for index, answer in enumerate(answers)
        ]
        completion = ChatCompletion(
            id=envelope.id,
            object="chat.completion",
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.fingerprint,
            choices=choices,
            usage=usage,
        )
        return completion.model_dump_json(exclude_unset=True)

    def opening(self, envelope: Envelope, index: int) -> str | None:
        return self._delta(envelope, index, ChoiceDelta(role="assistant", content=""), None)

    def piece(self, envelope: Envelope, index: int, text: str, finish: Finish | None) -> str:
        return self._delta(envelope, index, ChoiceDelta(content=text) if text else ChoiceDelta(), finish)

    def usage(self, envelope: Envelope, usage: CompletionUsage) -> str:
        return self._chunk(envelope, [], {"usage": usage})

    def _delta(self, envelope: Envelope, index: int, delta: ChoiceDelta, finish: Finish | None) -> str:
        choice = ChunkChoice(index=index, delta=delta, finish_reason=finish, logprobs=None)
        return self._chunk(envelope, [choice], _no_usage_yet(envelope))

    @staticmethod
    def _chunk(envelope: Envelope, choices: list[ChunkChoice], usage: _Usage) -> str:
        chunk = ChatCompletionChunk(
            id=envelope.id,
            object="chat.completion.chunk",
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.fingerprint,
            choices=choices,
            **usage,
        )
        return chunk.model_dump_json(exclude_unset=True)


def _no_usage_yet(envelope: Envelope) -> _Usage:
    return {"usage": None} if envelope.usage_follows else {}
