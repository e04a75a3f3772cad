"""What a request body may say, and how a wrong one is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fewstep.actors.serving.schema import (
    ChatBody,
    CompletionBody,
    UnsupportedField,
    parse_body,
    policy_for,
)
from fewstep.platform.errors import RequestError
from fewstep.platform.records import DecodePolicy

COMPLETION = {"model": "tiny", "prompt": "a"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
SHAPES: list[tuple[type[CompletionBody | ChatBody], dict[str, Any]]] = [
    (CompletionBody, COMPLETION),
    (ChatBody, CHAT),
]


def completion(**fields: Any) -> CompletionBody:
    return parse_body(CompletionBody, json.dumps({**COMPLETION, **fields}).encode())


def chat(**fields: Any) -> ChatBody:
    return parse_body(ChatBody, json.dumps({**CHAT, **fields}).encode())


@pytest.mark.parametrize(
    ("cls", "base", "name"),
    [
        (cls, base, name)
        for cls, base in SHAPES
        for name in sorted(cls.openai_fields - cls.model_fields.keys() - {"stream"})
    ],
)
def test_every_other_openai_field_is_refused_by_name(
    cls: type[CompletionBody], base: dict[str, Any], name: str
) -> None:
    with pytest.raises(UnsupportedField) as caught:
        parse_body(cls, json.dumps({**base, name: "anything"}).encode())
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("cls", "base", "name", "value"),
    [(cls, base, name, value) for cls, base in SHAPES for name, some in cls.idle.items() for value in some],
)
def test_values_that_ask_for_nothing_pass(
    cls: type[CompletionBody], base: dict[str, Any], name: str, value: Any
) -> None:
    assert name in cls.openai_fields
    with_it = parse_body(cls, json.dumps({**base, name: value}).encode())
    assert with_it == parse_body(cls, json.dumps({**base, name: None}).encode())


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"temperatur": 0.5}, "temperatur", "did you mean temperature?"),
        ({"fewstep": {"treshold": 0.5}}, "fewstep.treshold", "remove it"),
        ({"fewstep": {"threshold": 0.0}}, "fewstep.threshold", "greater than 0"),
        ({"fewstep": {"kind": "entropy"}}, "fewstep.kind", "'threshold', 'static', 'entropy_bound' or 'factor'"),
        ({"fewstep": 3}, "fewstep", "got 3"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": True}, "n", "valid integer"),
        ({"n": "2"}, "n", "valid integer"),
        ({"n": 3, "prompt": ["a"] * 43}, "n", "at most 128 choices"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": 5}, "stop", "valid string or a valid list"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "False"),
        ({"prompt": {"text": "a"}}, "prompt", "valid string or a valid list"),
        ({"echo": 0}, "echo", "only false"),
        ({"logprobs": 3}, "logprobs", "the head keeps no others"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_what_is_allowed(fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(RequestError, match=says.replace("?", r"\?")) as caught:
        completion(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"tools": [{"type": "function"}]}, "tools", r"only \[\]"),
        ({"response_format": {"type": "json_object"}}, "response_format", '"type": "text"'),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "one of the two"),
        ({"prompt": "a"}, "prompt", "documented fields"),
    ],
)
def test_a_wrong_chat_is_named(fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        chat(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b"[]", "got list"),
        (b'{"model": "tiny", "prompt": NaN}', "expected value"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "surrogate|escape"),
        (b"[" * 100_000, "recursion"),
        (b'\xff"', "expected value"),
    ],
)
def test_what_is_not_a_json_object_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        parse_body(CompletionBody, raw)
    assert caught.value.field == "body"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RequestError, match="required") as caught:
        parse_body(CompletionBody, b'{"prompt": "a"}')
    assert caught.value.field == "model"


def test_prompt_shapes() -> None:
    assert completion(prompt="ab").prompts == ["ab"]
    assert completion(prompt=["a", "b"]).prompts == ["a", "b"]
    assert completion(prompt=[5, 6]).prompts == [[5, 6]]
    assert completion(prompt=[[5], [6]]).prompts == [[5], [6]]


def test_token_limit_prefers_the_newer_name() -> None:
    assert chat(max_completion_tokens=7).token_limit == 7
    assert chat(max_tokens=8).token_limit == 8
    assert chat().token_limit is None


def test_message_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "ab"


def test_policy_is_the_default_with_what_was_asked_on_top() -> None:
    default = DecodePolicy(threshold=0.7, max_steps_per_block=4, temperature=0.5, seed=1)
    body = completion(top_p=0.9, fewstep={"kind": "static", "tokens_per_step": 3})
    assert policy_for(body, default, 9) == DecodePolicy(
        kind="static", tokens_per_step=3, max_steps_per_block=4, temperature=0.5, top_p=0.9, seed=9
    )  # fmt: skip
    assert policy_for(completion(temperature=0), default, 9).temperature == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tokens_per_step": 2}, "fewstep.tokens_per_step"),
        ({"kind": "threshold", "tokens_per_step": 2}, "fewstep.tokens_per_step"),
        ({"kind": "static", "threshold": 0.5}, "fewstep.threshold"),
    ],
)
def test_a_number_of_the_other_kind_is_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        policy_for(completion(fewstep=options), DecodePolicy(), 0)
    assert caught.value.field == field
