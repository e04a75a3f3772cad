"""Request bodies: OpenAI's fields that act here, Fewstep's own under `fewstep`, everything else refused by name.

A field of OpenAI's that has no effect here is accepted only at the value that asks for nothing (`echo: false`);
null means "not given" everywhere, as it does there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from fewstep.platform.errors import RequestError
from fewstep.platform.records import KIND_NUMBERS, CacheKind, DecodePolicy, PolicyKind
from fewstep.platform.registry import nearest

MAX_CHOICES = 128
MAX_STOPS = 4
_SHOWN = 80


class UnsupportedField(RequestError):
    """A field this server knows of but cannot honour."""


class UnknownField(RequestError):
    """A field that is nobody's."""


class _Part(BaseModel):
    """Strict: a number in quotes is not a number. Unknown keys are an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Part):
    include_usage: bool = False
    # Padding against traffic analysis, which this server does not do.
    include_obfuscation: Literal[False] = False


class FewstepOptions(_Part):
    """The decode policy of one request, over the server's default; DecodePolicy documents the fields."""

    kind: PolicyKind | None = None
    threshold: float | None = Field(default=None, gt=0.0, le=1.0)
    tokens_per_step: int | None = Field(default=None, ge=1)
    entropy_bound: float | None = Field(default=None, ge=0.0)
    factor: float | None = Field(default=None, gt=0.0)
    block_size: int | None = Field(default=None, ge=1)
    cache: CacheKind | None = None
    refresh_every: int | None = Field(default=None, ge=1)
    edit_threshold: float | None = Field(default=None, gt=0.0, le=1.0)
    max_edit_steps: int | None = Field(default=None, ge=0)
    max_steps_per_block: int | None = Field(default=None, ge=1)


class TextPart(_Part):
    type: Literal["text"]
    text: str


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _Body(_Part):
    """What both endpoints share.

    Attributes:
        user: goes into the server's log line of the request.
    """

    model: str
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: str | list[str] = Field(default_factory=list)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""
    fewstep: FewstepOptions = FewstepOptions()

    # OpenAI's names, and the values of those without effect here that ask for nothing.
    openai_fields: ClassVar[frozenset[str]] = frozenset()
    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int | None:
        """The most tokens of one answer, None = the server's default."""
        return self.max_tokens


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]

    openai_fields = frozenset(completion_create_params.CompletionCreateParamsBase.__annotations__)
    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "echo": (False,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "suffix": ("",),
    }

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more prompts, text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    openai_fields = frozenset(chat_create_params.CompletionCreateParamsBase.__annotations__)
    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "function_call": ("none",),
        "functions": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "metadata": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "presence_penalty": (0,),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
    }

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


BodyT = TypeVar("BodyT", bound=_Body)


def parse_body(cls: type[BodyT], raw: bytes) -> BodyT:
    """A checked request body.

    Raises:
        UnknownField, UnsupportedField, RequestError: what is wrong, by the field's dotted name.
    """
    try:
        values = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError("body", str(error), "a JSON object", "send valid JSON") from error
    if not isinstance(values, dict):
        raise RequestError("body", type(values).__name__, "a JSON object", "send an object")
    given = {name: value for name, value in values.items() if value is not None}
    for name in given.keys() - cls.model_fields.keys():
        _check_idle(cls, name, given[name])
    try:
        body = cls.model_validate({name: given[name] for name in given.keys() & cls.model_fields.keys()})
    except ValidationError as error:
        raise _field_error(error) from error
    _check_together(body)
    return body


def policy_for(body: _Body, default: DecodePolicy, seed: int) -> DecodePolicy:
    """The request's decode policy: the server's default, with what the request asks for on top.

    Raises:
        RequestError: a field that would do nothing beside the others.
    """
    asked = body.fewstep.model_dump(exclude_none=True)
    base = default.model_dump()
    kind = asked.get("kind", default.kind)
    edits = asked.get("edit_threshold", default.edit_threshold) is not None
    approximate = asked.get("cache", default.cache) in ("prefix", "dual")
    # field -> (whether it acts, what makes it act)
    needs = {name: (owner == kind, f"kind={owner}") for owner, name in KIND_NUMBERS.items()}
    needs["max_edit_steps"] = (edits, "edit_threshold set")
    needs["refresh_every"] = (approximate, "cache=prefix or cache=dual")
    for name, (acts, need) in needs.items():
        if not acts:
            base.pop(name)
            if name in asked:
                raise RequestError(
                    f"fewstep.{name}",
                    f"{asked[name]} without fewstep.{need}",
                    need,
                    f"set fewstep.{need} or leave fewstep.{name} out",
                )
    for name in ("temperature", "top_p"):
        value = getattr(body, name)
        if value is not None:
            asked[name] = value
    return DecodePolicy.model_validate({**base, **asked, "seed": seed})


def _check_idle(cls: type[_Body], name: str, value: Any) -> None:
    """Raise unless `name` is a field of OpenAI's at a value that asks for nothing."""
    if name not in cls.openai_fields:
        raise UnknownField(
            name,
            _shorten(value),
            "OpenAI's fields and `fewstep`",
            "remove it" + nearest(name, sorted(cls.model_fields)),
        )
    idle = cls.idle.get(name, ())
    # `type` as well as equality: to Python False is 0, to a client it is not.
    if not any(
        value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in idle
    ):
        allowed = " or ".join(_shorten(harmless) for harmless in idle)
        raise UnsupportedField(
            name,
            _shorten(value),
            f"only {allowed}, which asks for nothing" if idle else "nothing: this server does not support it",
            "remove it",
        )


def _check_together(body: _Body) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options", "it without stream", "stream=true", "set stream or remove it")
    if len(body.stops) > MAX_STOPS:
        raise RequestError("stop", f"{len(body.stops)} strings", f"at most {MAX_STOPS}", "send fewer")
    if isinstance(body, CompletionBody) and len(body.prompts) * body.n > MAX_CHOICES:
        raise RequestError(
            "n",
            f"{len(body.prompts)} prompts x {body.n}",
            f"at most {MAX_CHOICES} choices",
            "send fewer prompts at once",
        )
    if isinstance(body, ChatBody) and None not in (body.max_tokens, body.max_completion_tokens):
        raise RequestError(
            "max_tokens", "it and max_completion_tokens", "one of the two", "keep max_completion_tokens"
        )


def _field_error(error: ValidationError) -> RequestError:
    """The most specific problem of the first wrong field as one line, under the name the client used."""
    first = error.errors()[0]
    # A field of several shapes reports one problem a shape; the deepest belongs to the shape that was meant.
    problems = [problem for problem in error.errors() if problem["loc"][0] == first["loc"][0]]
    problem = max(problems, key=lambda found: len(found["loc"]))
    field = _dotted(problem["loc"])
    if problem["type"] == "missing":
        return RequestError(field, "nothing", "a value (the field is required)", f"send {field}")
    if problem["type"] == "extra_forbidden":
        return UnknownField(field, _shorten(problem["input"]), "the documented fields", "remove it")
    allowed = [
        other["msg"].removeprefix("Input should be ") for other in problems if _dotted(other["loc"]) == field
    ]
    return RequestError(
        field, _shorten(problem["input"]), " or ".join(dict.fromkeys(allowed)), f"change {field}"
    )


def _dotted(loc: tuple[int | str, ...]) -> str:
    """A location as the client spells it: pydantic adds names of shapes ("list[TextPart]"), which nobody sent."""
    parts = [str(part) for part in loc if isinstance(part, int) or part.isidentifier()]
    return ".".join(part for part in parts if part not in ("str", "int"))


def _shorten(value: Any) -> str:
    """A JSON value as the client wrote it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
