"""The application over a real engine, asked by the real client."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Completion
from tests.actors.serving.tiny import build_tokenizer, tiny_model

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.serving.limits import LimitsConfig
from fewstep.actors.serving.service import CompletionService
from fewstep.platform.records import DecodePolicy, WeightVersion
from fewstep.platform.rng import derive_seed

SAMPLED: dict[str, Any] = {"model": "tiny", "temperature": 1.0, "seed": 11, "max_tokens": 40}
LONG: dict[str, Any] = {
    "model": "tiny", "prompt": "a long one", "max_tokens": 1900, "seed": 0, "temperature": 0,
    "fewstep": {"kind": "static", "tokens_per_step": 1},
}  # fmt: skip


def counts(answer: Completion) -> dict[str, Any]:
    """The usage of an answer without its time."""
    assert answer.usage is not None
    usage = answer.usage.model_dump()
    del usage["fewstep"]["time_to_first_block_s"]
    return usage


def until_idle(service: CompletionService) -> dict[str, int | str]:
    deadline = time.monotonic() + 10
    while (stats := service.host.stats())["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    return stats


def test_models(client: OpenAI) -> None:
    listed = client.models.list().data
    assert [(model.id, model.created, model.owned_by) for model in listed] == [
        ("tiny", 1_700_000_000, "fewstep")
    ]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion_is_the_engines_own_result(client: OpenAI) -> None:
    tokenizer = build_tokenizer()
    engine = Engine(tiny_model(tokenizer), tokenizer, weight_version=WeightVersion("x", 0, "0"))
    policy = DecodePolicy(threshold=0.5, temperature=1.0, seed=11)
    prompt = tuple(tokenizer.encode("def f(x):").ids)
    trajectory = engine.generate([Request("r", prompt, policy, 40)])[0]

    answer = client.completions.create(prompt="def f(x):", **SAMPLED)

    assert answer.object == "text_completion"
    assert answer.choices[0].text == engine.text_of(trajectory)
    assert answer.choices[0].finish_reason == trajectory.finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, trajectory.num_tokens)
    assert answer.usage.total_tokens == 9 + trajectory.num_tokens
    extra = answer.usage.model_extra
    assert extra is not None
    assert extra["fewstep"].pop("time_to_first_block_s") > 0
    assert extra["fewstep"] == {
        "forwards": trajectory.forwards,
        "tokens_per_forward": trajectory.tokens_per_forward,
    }
    assert answer._request_id == answer.id


def test_chat_is_the_completion_of_its_only_message(client: OpenAI) -> None:
    text = client.completions.create(prompt="abc", **SAMPLED).choices[0].text
    answer = client.chat.completions.create(messages=[{"role": "user", "content": "abc"}], **SAMPLED)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"


def test_choices_have_seeds_of_their_own_and_the_first_is_the_plain_one(client: OpenAI) -> None:
    many = client.completions.create(prompt=["abc", "xyz"], n=3, **SAMPLED)
    assert [choice.index for choice in many.choices] == list(range(6))
    alone = client.completions.create(prompt="xyz", **SAMPLED)
    assert many.choices[3].text == alone.choices[0].text
    derived = client.completions.create(prompt="abc", **{**SAMPLED, "seed": derive_seed(11, 2)})
    assert many.choices[2].text == derived.choices[0].text
    assert len({choice.text for choice in many.choices}) == 6
    assert many.usage is not None
    assert many.usage.prompt_tokens == 6


def test_without_a_seed_two_answers_differ(client: OpenAI) -> None:
    unseeded = {**SAMPLED, "seed": None}
    texts = {client.completions.create(prompt="abc", **unseeded).choices[0].text for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize("size", [1, 3])
def test_stop_string_ends_the_text_before_it(client: OpenAI, size: int) -> None:
    whole = client.completions.create(prompt="abc", **SAMPLED).choices[0].text
    stop = whole[12 : 12 + size]
    answer = client.completions.create(prompt="abc", stop=[stop, "not in it"], **SAMPLED)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == whole.index(
        stop
    )  # a token a character; none behind it is billed
    pieces = client.completions.create(prompt="abc", stop=stop, stream=True, **SAMPLED)
    assert "".join(piece.choices[0].text for piece in pieces) == whole[: whole.index(stop)]


def test_stream_of_completions_adds_up(client: OpenAI) -> None:
    whole = client.completions.create(prompt=["abc", "xyz"], n=2, **SAMPLED)
    chunks = list(
        client.completions.create(
            prompt=["abc", "xyz"], n=2, stream=True, stream_options={"include_usage": True}, **SAMPLED
        )
    )
    *pieces, last = chunks
    texts, finishes = [""] * 4, [""] * 4
    for piece in pieces:
        assert piece.usage is None
        assert "usage" in piece.model_fields_set
        texts[piece.choices[0].index] += piece.choices[0].text
        finishes[piece.choices[0].index] = piece.choices[0].finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert len(pieces) > 4 + 4  # text came in more than one piece a choice
    assert last.choices == []
    assert counts(last) == counts(whole)


def test_stream_of_a_chat_adds_up(client: OpenAI) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "abc"}], **SAMPLED}
    whole = client.chat.completions.create(**asked)
    first, *pieces = client.chat.completions.create(stream=True, **asked)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert (
        "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    )
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all("usage" not in piece.model_fields_set for piece in pieces)


def test_stream_events_on_the_wire(url: str) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "abc", "stream": True, **SAMPLED})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith('data: {"id":"cmpl-') for event in events[:-2])


def test_policy_of_the_request_changes_the_forwards(client: OpenAI) -> None:
    def forwards(**options: Any) -> int:
        answer = client.completions.create(prompt="abcdefgh", extra_body={"fewstep": options}, **SAMPLED)
        assert answer.usage is not None
        assert answer.usage.model_extra is not None
        return int(answer.usage.model_extra["fewstep"]["forwards"])

    one = forwards(kind="static", tokens_per_step=1)
    assert forwards(kind="static", tokens_per_step=4) <= one // 2
    assert forwards(kind="static", max_steps_per_block=1) <= one // 4


def test_default_length_is_the_servers_or_what_the_context_leaves(client: OpenAI) -> None:
    greedy = {"model": "tiny", "temperature": 0}
    answer = client.completions.create(prompt="a long one", **greedy)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (24, "length")
    answer = client.completions.create(prompt="a long one" * 204, **greedy)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "gpt"}, 404, "model", "model_not_found"),
        ({"logprobs": 3}, 400, "logprobs", "unsupported_parameter"),
        ({"top_k": 3}, 400, "top_k", "unknown_parameter"),
        ({"temperature": 3}, 400, "temperature", "invalid_value"),
        ({"prompt": ""}, 400, "prompt", "invalid_value"),
        ({"prompt": []}, 400, "prompt", "invalid_value"),
        ({"prompt": "a<|mask|>b"}, 400, "prompt", "invalid_value"),
        ({"prompt": [5, 10**9]}, 400, "prompt", "invalid_value"),
        ({"prompt": [5, -1]}, 400, "prompt", "invalid_value"),
        ({"prompt": "a" * 2048}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": 2048}, 400, "max_tokens", "invalid_value"),
        ({"stop": ""}, 400, "stop", "invalid_value"),
        ({"prompt": "a" * LimitsConfig().max_body_bytes}, 413, "body", "request_too_large"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_openais_shape(
    url: str, fields: dict[str, Any], status: int, param: str, code: str, stream: bool
) -> None:
    body = {"model": "tiny", "prompt": "abc", "stream": stream, **fields}
    response = httpx.post(f"{url}/v1/completions", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert "fix: " in error["message"]


def test_the_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=2
        )
    assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)]
)
def test_errors_of_routing_have_the_same_shape(url: str, method: str, path: str, status: int) -> None:
    response = httpx.request(method, url + path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_reader_that_leaves_a_stream_frees_the_slot(url: str, service: CompletionService) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True, "n": 3}) as response:
        pieces = response.iter_bytes()  # kept: dropping the iterator closes the stream
        next(pieces)
        deadline = time.monotonic() + 10
        while service.host.stats()["running"] != 3:  # the other two may join a step later
            assert time.monotonic() < deadline
            time.sleep(0.001)
    stats = until_idle(service)
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert int(stats["committed_tokens"]) < 3 * 1900


def test_a_client_that_stops_waiting_frees_the_slot(url: str, service: CompletionService) -> None:
    before = int(service.host.stats()["forwards"])
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=LONG, timeout=0.3)
    stats = until_idle(service)
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert 0 < int(stats["forwards"]) - before < 1900


def test_health_names_model_and_weights(url: str) -> None:
    health = httpx.get(f"{url}/health").json()
    assert health["status"] == "ok"
    assert health["model"] == "tiny"
    assert health["weight_version"] == "test:0:000000000000"
