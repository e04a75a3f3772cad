"""Request bodies: OpenAI's fields that act here, Fewstep's own under `fewstep`, everything else refused by name.

A field of OpenAI's that has no effect here is accepted only at the value that asks for nothing (`echo: false`);
null means "not given" everywhere, as it does there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from fewstep.actors.serving.body_errors import UnknownField, UnsupportedField, field_error, shorten
from fewstep.platform.errors import RequestError
from fewstep.platform.records import KIND_NUMBERS, MAX_COUNT, CacheKind, DecodePolicy, PolicyKind
from fewstep.platform.registry import nearest

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_PRIORITY = 100


class _Part(BaseModel):
    """Strict: a number in quotes is not a number. Unknown keys are an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Part):
    include_usage: bool = False
    # Padding against traffic analysis, which this server does not do.
    include_obfuscation: Literal[False] = False


class PolicyOptions(_Part):
    """The decode policy of one request, over the server's default; DecodePolicy documents the fields."""

    kind: PolicyKind | None = None
    threshold: float | None = Field(default=None, gt=0.0, le=1.0)
    tokens_per_step: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    entropy_bound: float | None = Field(default=None, ge=0.0)
    factor: float | None = Field(default=None, gt=0.0)
    block_size: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    cache: CacheKind | None = None
    refresh_every: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    edit_threshold: float | None = Field(default=None, gt=0.0, le=1.0)
    max_edit_steps: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    max_steps_per_block: int | None = Field(default=None, ge=1, le=MAX_COUNT)


class FewstepOptions(PolicyOptions):
    """What only a diffusion server can do, beside the decode policy.

    Attributes:
        canvas: the form of a `diffusing` stream: the live block beside committed deltas, or whole texts that replace.
        return_trajectory: whether an answer comes with its step map, log-probabilities and edits.
        priority: waiting requests of a higher one get a slot first.
    """

    canvas: Literal["blocks", "whole_text"] | None = None
    return_trajectory: bool = False
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)


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


class _Checked(_Part):
    """A request body.

    Attributes:
        openai_fields: OpenAI's names for the endpoint; idle: the values of those without effect here that ask for nothing.
    """

    openai_fields: ClassVar[frozenset[str]] = frozenset()
    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


class _Body(_Checked):
    """What all endpoints share.

    Attributes:
        diffusing: a stream shows provisional canvases between its committed deltas.
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
    diffusing: bool = False
    user: str = ""
    fewstep: FewstepOptions = FewstepOptions()

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

    @property
    def num_tries(self) -> int:
        """Answers to generate for each prompt; the `n` best are given back."""
        return self.n

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer says how probable its tokens were."""
        return False


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str = ""
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    logprobs: int | None = Field(default=None, ge=0, le=5)

    openai_fields = frozenset(completion_create_params.CompletionCreateParamsBase.__annotations__)
    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "echo": (False,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "presence_penalty": (0,),
    }

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more prompts, text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def num_tries(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class FimBody(CompletionBody):
    """POST /v1/fim/completions: one prefix, one suffix."""

    prompt: str


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False

    openai_fields = frozenset(chat_create_params.CompletionCreateParamsBase.__annotations__)
    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "function_call": ("none",),
        "functions": ([],),
        "logit_bias": ({},),
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

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs


class ApplyBody(ChatBody):
    """POST /v1/apply/completions: one user message with tagged original code and update."""


class EditBody(ChatBody):
    """POST /v1/edit/completions: one user message with the tagged file, its editable region and what came before."""


class TokenizeBody(_Checked):
    """POST /tokenize: a text or a conversation, as `/v1/completions` and `/v1/chat/completions` would read it."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    return_token_strs: bool = False


BodyT = TypeVar("BodyT", bound=_Checked)


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
        raise field_error(error) from error
    _check_together(body)
    return body


def policy_for(body: _Body, default: DecodePolicy, seed: int) -> DecodePolicy:
    """The request's decode policy: the server's default, with what the request asks for on top.

    Raises:
        RequestError: a field that would do nothing beside the others.
    """
    asked = body.fewstep.model_dump(include=set(PolicyOptions.model_fields), exclude_none=True)
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


def _check_idle(cls: type[_Checked], name: str, value: Any) -> None:
    """Raise unless `name` is a field of OpenAI's at a value that asks for nothing."""
    if name not in cls.openai_fields:
        raise UnknownField(
            name,
            shorten(value),
            "the endpoint's documented fields",
            "remove it" + nearest(name, sorted(cls.model_fields)),
        )
    idle = cls.idle.get(name, ())
    # `type` as well as equality: to Python False is 0, to a client it is not.
    if not any(
        value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in idle
    ):
        allowed = " or ".join(shorten(harmless) for harmless in idle)
        raise UnsupportedField(
            name,
            shorten(value),
            f"only {allowed}, which asks for nothing" if idle else "nothing: this server does not support it",
            "remove it",
        )


def _check_together(body: _Checked) -> None:
    if isinstance(body, TokenizeBody) and (body.prompt is None) == (body.messages is None):
        got = "neither" if body.prompt is None else "both"
        raise RequestError("prompt", f"{got} of prompt and messages", "one of them", "send one")
    if isinstance(body, _Body):
        _check_generation(body)


def _check_generation(body: _Body) -> None:
    _check_stream(body)
    if len(body.stops) > MAX_STOPS:
        raise RequestError("stop", f"{len(body.stops)} strings", f"at most {MAX_STOPS}", "send fewer")
    if isinstance(body, CompletionBody):
        _check_choices(body)
    if isinstance(body, ChatBody) and None not in (body.max_tokens, body.max_completion_tokens):
        raise RequestError(
            "max_tokens", "it and max_completion_tokens", "one of the two", "keep max_completion_tokens"
        )


def _check_stream(body: _Body) -> None:
    for name, given in (("stream_options", body.stream_options is not None), ("diffusing", body.diffusing)):
        if given and not body.stream:
            raise RequestError(name, "it without stream", "stream=true", "set stream or remove it")
    if body.fewstep.canvas is not None and not body.diffusing:
        raise RequestError(
            "fewstep.canvas", "it without diffusing", "diffusing=true", "set diffusing or remove it"
        )


def _check_choices(body: CompletionBody) -> None:
    if body.logprobs:
        raise UnsupportedField(
            "logprobs",
            body.logprobs,
            "0: the chosen token's own; the head keeps no others",
            "send 0 or remove it",
        )
    if body.best_of is not None and body.best_of < body.n:
        raise RequestError("best_of", body.best_of, f"at least n, {body.n}", "raise best_of or lower n")
    if body.num_tries > body.n and body.stream:
        raise RequestError(
            "best_of", f"{body.best_of} with stream", "n: the best are known at the end", "remove one of them"
        )
    if len(body.prompts) * body.num_tries > MAX_CHOICES:
        raise RequestError(
            "n" if body.best_of is None else "best_of",
            f"{len(body.prompts)} prompts x {body.num_tries}",
            f"at most {MAX_CHOICES} choices",
            "send fewer prompts at once",
        )
