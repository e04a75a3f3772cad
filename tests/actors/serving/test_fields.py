"""Every field of OpenAI's schemas acts or is refused by name; Fewstep's own act."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from fewstep.actors.engine.request import Request
from fewstep.actors.serving.schema import ChatBody, CompletionBody, PolicyOptions
from fewstep.actors.serving.service import CompletionService

SAMPLED: dict[str, Any] = {"model": "tiny", "temperature": 1.0, "seed": 11, "max_tokens": 40}

# What OpenAI's package knows, and what becomes of it here. A field that the package gains is in none of them.
ACTS = {
    "completions": {
        "best_of", "logprobs", "max_tokens", "model", "n", "prompt", "seed", "stop", "stream", "stream_options",
        "suffix", "temperature", "top_p", "user",
    },
    "chat": {
        "logprobs", "max_completion_tokens", "max_tokens", "messages", "model", "n", "seed", "stop", "stream",
        "stream_options", "temperature", "top_p", "user",
    },
}  # fmt: skip
REFUSED = {
    "completions": {"echo", "frequency_penalty", "logit_bias", "presence_penalty"},
    "chat": {
        "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "metadata", "modalities",
        "moderation", "parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "response_format",
        "safety_identifier", "service_tier", "store", "tool_choice", "tools", "top_logprobs", "verbosity",
        "web_search_options",
    },
}  # fmt: skip
BODIES = {"completions": CompletionBody, "chat": ChatBody}
PARAMS = {
    "completions": (
        completion_create_params.CompletionCreateParamsBase,
        completion_create_params.CompletionCreateParamsStreaming,
    ),
    "chat": (
        chat_create_params.CompletionCreateParamsBase,
        chat_create_params.CompletionCreateParamsStreaming,
    ),
}


@pytest.mark.parametrize("endpoint", BODIES)
def test_the_packages_fields_are_all_decided(endpoint: str) -> None:
    known = {name for cls in PARAMS[endpoint] for name in cls.__annotations__}
    assert known == ACTS[endpoint] | REFUSED[endpoint]
    assert ACTS[endpoint] & REFUSED[endpoint] == set()
    assert ACTS[endpoint] == known & BODIES[endpoint].model_fields.keys()


@pytest.mark.parametrize(
    ("endpoint", "name"), [(endpoint, name) for endpoint, names in REFUSED.items() for name in sorted(names)]
)
def test_a_refused_field_is_named_over_http(url: str, endpoint: str, name: str) -> None:
    path = "/v1/completions" if endpoint == "completions" else "/v1/chat/completions"
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 1, name: {"anything": 1}}
    asked |= (
        {"prompt": "a"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    )
    response = httpx.post(url + path, json=asked)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_json_output_is_refused_and_says_so(client: OpenAI) -> None:
    for kind in (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    ):
        with pytest.raises(openai.BadRequestError, match="response_format") as caught:
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "a"}],
                response_format=kind,  # type: ignore[arg-type]
            )
        assert caught.value.code == "unsupported_parameter"


def trajectory_of(choice: Any) -> dict[str, Any]:
    found: dict[str, Any] = choice.model_extra["fewstep"]["trajectory"]
    return found


def test_best_of_gives_the_most_probable_tries(client: OpenAI) -> None:
    extra = {"fewstep": {"return_trajectory": True}}
    tries = client.completions.create(prompt=["abc", "xyz"], n=4, extra_body=extra, **SAMPLED)
    best = client.completions.create(prompt=["abc", "xyz"], n=2, best_of=4, **SAMPLED)
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    for prompt in range(2):
        own = tries.choices[4 * prompt : 4 * prompt + 4]
        own.sort(key=lambda choice: -float(np.mean(trajectory_of(choice)["logprobs"])))
        chosen = best.choices[2 * prompt : 2 * prompt + 2]
        assert [choice.text for choice in chosen] == [choice.text for choice in own[:2]]
    assert best.usage is not None
    assert tries.usage is not None
    assert best.usage.completion_tokens == tries.usage.completion_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 65, "prompt": ["a", "b"]}, "best_of"),
        ({"logprobs": 1}, "logprobs"),
        ({"fewstep": {"priority": 101}}, "fewstep.priority"),
        ({"fewstep": {"return_trajectory": "yes"}}, "fewstep.return_trajectory"),
    ],
)
def test_what_cannot_be_honoured_is_named(url: str, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
def test_a_trajectory_is_how_the_answer_came_to_be(client: OpenAI, stream: bool) -> None:
    extra = {"fewstep": {"return_trajectory": True, "edit_threshold": 0.01, "threshold": 0.01}}
    whole = client.completions.create(prompt="abc", extra_body=extra, **SAMPLED)
    record = trajectory_of(whole.choices[0])
    if stream:
        *_, last = client.completions.create(prompt="abc", stream=True, extra_body=extra, **SAMPLED)
        assert trajectory_of(last.choices[0]) == record
    assert whole.usage is not None
    count = whole.usage.completion_tokens
    for name in ("token_ids", "step_map", "logprobs", "confidences"):
        assert len(record[name]) == count, name
    assert min(record["step_map"]) >= 0
    assert max(record["step_map"]) < record["forwards"]
    assert record["edits"]
    for edit in record["edits"]:
        assert record["step_map"][edit["position"]] > edit["step"]
    assert record["policy"]["edit_threshold"] == 0.01
    assert record["weight_version_last"] == whole.system_fingerprint


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(client: OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "abc"}], "logprobs": True, **SAMPLED}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content is not None
    if stream:
        pieces = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]
        found = [
            token for piece in pieces if piece.logprobs is not None for token in piece.logprobs.content or []
        ]
        assert found == content
    assert "".join(token.token for token in content) == whole.message.content
    assert all(bytes(token.bytes or []).decode() == token.token for token in content)
    assert all(token.logprob <= 0 and token.top_logprobs == [] for token in content)


def test_priority_reaches_the_engine(service: CompletionService) -> None:
    body = CompletionBody.model_validate(
        {"model": "tiny", "prompt": "a", "fewstep": {"priority": 7}}, strict=True
    )
    request: Request = service.plan(body).requests[0]
    assert request.priority == 7


NUMBERS = [0, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, 10**400, 1e39, 1e308, 5e-324]
BESIDE: dict[str, dict[str, Any]] = {
    "tokens_per_step": {"kind": "static"},
    "entropy_bound": {"kind": "entropy_bound"},
    "factor": {"kind": "factor"},
    "max_edit_steps": {"edit_threshold": 0.1},
    "refresh_every": {"cache": "dual"},
}


@pytest.mark.parametrize("model", ["tiny", "both"])
@pytest.mark.parametrize(
    "name", ["seed", "max_tokens", "n", "temperature", "prompt", *sorted(PolicyOptions.model_fields)]
)
def test_no_number_is_more_than_a_bad_request(
    url_of_both: str, service: CompletionService, bidirectional: CompletionService, model: str, name: str
) -> None:
    for value in NUMBERS:
        body: dict[str, Any] = {"model": model, "prompt": "ab", "max_tokens": 9}
        if name in PolicyOptions.model_fields:
            body["fewstep"] = {**BESIDE.get(name, {}), name: value}
        else:
            body[name] = [5, value] if name == "prompt" else value
        response = httpx.post(f"{url_of_both}/v1/completions", content=json.dumps(body), timeout=60)
        assert response.status_code in (200, 400), (value, response.text)
    assert service.host.healthy
    assert bidirectional.host.healthy
