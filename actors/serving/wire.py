"""Answers in OpenAI's shapes, built from the `openai` package's own types."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from fewstep.actors.serving.answers import Answer, TokenLogprobs
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
class Piece:
    """One chunk of one choice.

    Attributes:
        text: newly final text, or the whole text so far in the form that replaces.
        finish: set in the last chunk of a choice.
        canvas: what `fewstep.canvas` of the chunk shows; None = nothing.
        answer: the finished choice, for what comes with its last chunk.
    """

    text: str = ""
    finish: Finish | None = None
    canvas: Mapping[str, Any] | None = None
    answer: Answer | None = None


def finish_of(trajectory: Trajectory) -> Finish:
    """OpenAI's finish reason; an aborted request has no reader to tell it to."""
    assert trajectory.finish_reason != "abort"
    return trajectory.finish_reason


def usage_of(
    num_prompt_tokens: int, trajectories: Sequence[Trajectory], first_block_s: float | None
) -> CompletionUsage:
    """Committed tokens only: masks, and what lies behind an end of sequence or a stop string, are not billed.

    `usage.fewstep` adds the forwards, summed over choices, committed tokens per forward, and seconds to the first block.
    """
    num_tokens = sum(trajectory.num_tokens for trajectory in trajectories)
    forwards = sum(trajectory.forwards for trajectory in trajectories)
    return CompletionUsage.model_validate(
        {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
            "fewstep": {
                "forwards": forwards,
                "tokens_per_forward": num_tokens / max(1, forwards),
                "time_to_first_block_s": first_block_s,
            },
        }
    )


class Wire(Protocol):
    """The shapes of one endpoint: a whole answer, or the chunks of a stream, each as JSON text."""

    id_prefix: str

    def whole(self, envelope: Envelope, answers: Sequence[Answer], usage: CompletionUsage) -> str: ...

    def opening(self, envelope: Envelope, index: int) -> str | None:
        """The chunk that opens a choice, if the endpoint has one."""

    def piece(self, envelope: Envelope, index: int, piece: Piece) -> str: ...

    def usage(self, envelope: Envelope, usage: CompletionUsage) -> str: ...


class CompletionWire:
    """/v1/completions and /v1/fim/completions."""

    id_prefix = "cmpl-"

    def whole(self, envelope: Envelope, answers: Sequence[Answer], usage: CompletionUsage) -> str:
        choices = [
            CompletionChoice.model_validate(
                {
                    "index": index,
                    "text": answer.text,
                    "finish_reason": finish_of(answer.trajectory),
                    "logprobs": _completion_logprobs(answer.logprobs),
                    **_record(answer),
                }
            )
            for index, answer in enumerate(answers)
        ]
        return self._json(envelope, choices, {"usage": usage})

    def opening(self, envelope: Envelope, index: int) -> str | None:
        return None

    def piece(self, envelope: Envelope, index: int, piece: Piece) -> str:
        fields: dict[str, Any] = {"index": index, "text": piece.text, "finish_reason": piece.finish}
        fields["logprobs"] = None if piece.answer is None else _completion_logprobs(piece.answer.logprobs)
        # The package's type leaves out that a chunk's finish_reason is null until the last.
        choice = CompletionChoice.model_construct(**fields, **_record(piece.answer))
        return self._json(envelope, [choice], _no_usage_yet(envelope), _canvas(piece))

    def usage(self, envelope: Envelope, usage: CompletionUsage) -> str:
        return self._json(envelope, [], {"usage": usage})

    @staticmethod
    def _json(
        envelope: Envelope, choices: list[CompletionChoice], usage: _Usage, extra: Mapping[str, Any] = {}
    ) -> str:
        completion = Completion(
            id=envelope.id,
            object="text_completion",
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.fingerprint,
            choices=choices,
            **usage,
            **extra,
        )
        return completion.model_dump_json(exclude_unset=True, warnings=False)


class ChatWire:
    """/v1/chat/completions, /v1/apply/completions and /v1/edit/completions."""

    id_prefix = "chatcmpl-"

    def whole(self, envelope: Envelope, answers: Sequence[Answer], usage: CompletionUsage) -> str:
        choices = [
            ChatChoice.model_validate(
                {
                    "index": index,
                    "message": ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
                    "finish_reason": finish_of(answer.trajectory),
                    "logprobs": _chat_logprobs(answer.logprobs),
                    **_record(answer),
                }
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
        choice = ChunkChoice(
            index=index, delta=ChoiceDelta(role="assistant", content=""), finish_reason=None, logprobs=None
        )
        return self._chunk(envelope, [choice], _no_usage_yet(envelope))

    def piece(self, envelope: Envelope, index: int, piece: Piece) -> str:
        fields: dict[str, Any] = {"index": index, "finish_reason": piece.finish}
        fields["delta"] = ChoiceDelta(content=piece.text) if piece.text else ChoiceDelta()
        fields["logprobs"] = None if piece.answer is None else _chat_logprobs(piece.answer.logprobs)
        choice = ChunkChoice.model_validate({**fields, **_record(piece.answer)})
        return self._chunk(envelope, [choice], _no_usage_yet(envelope), _canvas(piece))

    def usage(self, envelope: Envelope, usage: CompletionUsage) -> str:
        return self._chunk(envelope, [], {"usage": usage})

    @staticmethod
    def _chunk(
        envelope: Envelope, choices: list[ChunkChoice], usage: _Usage, extra: Mapping[str, Any] = {}
    ) -> str:
        chunk = ChatCompletionChunk(
            id=envelope.id,
            object="chat.completion.chunk",
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.fingerprint,
            choices=choices,
            **usage,
            **extra,
        )
        return chunk.model_dump_json(exclude_unset=True)


def _no_usage_yet(envelope: Envelope) -> _Usage:
    return {"usage": None} if envelope.usage_follows else {}


def _canvas(piece: Piece) -> dict[str, Any]:
    return {} if piece.canvas is None else {"fewstep": {"canvas": piece.canvas}}


def _record(answer: Answer | None) -> dict[str, Any]:
    if answer is None or answer.record is None:
        return {}
    return {"fewstep": {"trajectory": answer.record}}


def _completion_logprobs(found: TokenLogprobs | None) -> dict[str, Any] | None:
    if found is None:
        return None
    lengths = itertools.accumulate((len(text) for text in found.texts), initial=0)
    return {
        "tokens": list(found.texts),
        "token_logprobs": list(found.logprobs),
        "top_logprobs": None,
        "text_offset": list(lengths)[:-1],
    }


def _chat_logprobs(found: TokenLogprobs | None) -> dict[str, Any] | None:
    if found is None:
        return None
    content = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in zip(found.texts, found.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}
