"""Suffix, FIM, apply, edit and tokenize, asked by the real client and as editors ask."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types import CompletionChoice

from fewstep.actors.engine.request import Request, Update
from fewstep.actors.serving.prompts import Prompts
from fewstep.actors.serving.schema import ApplyBody, CompletionBody, EditBody, FimBody, Message
from fewstep.actors.serving.service import CompletionService
from fewstep.platform.records import DecodePolicy

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 11}
APPLY = (
    "<|original_code|>\ndef f(x): return x\n<|/original_code|>\n"
    "<|update_snippet|>\n// ... existing code ...\ndef g(x): return 2\n<|/update_snippet|>"
)
EDIT = (
    "<|recently_viewed_code_snippets|>\n<|recently_viewed_code_snippet|>\ncode_snippet_file_path: b.py\nSEEN = 1\n"
    "<|/recently_viewed_code_snippet|>\n<|/recently_viewed_code_snippets|>\n\n"
    "<|current_file_content|>\ncurrent_file_path: a.py\nimport b\n<|code_to_edit|>\ndef f(<|cursor|>x):\n    pass\n"
    "<|/code_to_edit|>\nprint(f(b))\n<|/current_file_content|>\n\n"
    "<|edit_diff_history|>\n--- a.py\n+++ a.py\n<|/edit_diff_history|>"
)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def last_update(service: CompletionService, request: Request) -> Update:
    return [update async for update in service.host.submit(request)][-1]


@pytest.mark.parametrize("model", ["tiny", "both"])
def test_a_suffix_is_infill_by_the_engine(
    client_of_both: OpenAI, service: CompletionService, bidirectional: CompletionService, model: str
) -> None:
    served = service if model == "tiny" else bidirectional
    encode = served.model.tokenizer.encode

    def ask(suffix: str) -> CompletionChoice:
        return client_of_both.completions.create(
            model=model, prompt="def f(x):", suffix=suffix, max_tokens=8, logprobs=0, **SAMPLED
        ).choices[0]

    answer = ask("return x")
    policy = DecodePolicy(threshold=0.5, temperature=1.0, seed=11)
    ids, suffix = tuple(encode("def f(x):").ids), tuple(encode("return x").ids)
    # The whole suffix: what the service leaves out for a block-causal model has no say.
    ended = asyncio.run(last_update(served, Request("r", ids, policy, 8, suffix_ids=suffix)))
    assert ended.trajectory is not None
    assert answer.text == served.model.tokenizer.decode(ended.trajectory.completion_ids.tolist())
    assert answer.logprobs is not None
    assert answer.logprobs.tokens == list(answer.text)
    assert answer.logprobs.text_offset == list(range(len(answer.text)))
    logprobs = answer.logprobs.token_logprobs
    assert logprobs == pytest.approx(ended.trajectory.logprob.tolist(), abs=1e-4)
    other = ask("ZZZZZZZZ").logprobs
    assert other is not None
    # The suffix is seen: it moves the log-probabilities by more than rounding does.
    assert max(abs(a - b) for a, b in zip(logprobs, other.token_logprobs or [], strict=True)) > 1e-3


def test_fim_is_the_completion_with_a_suffix(url_of_both: str, client_of_both: OpenAI) -> None:
    body = {"model": "both", "prompt": "ab", "suffix": "yz", "max_tokens": 9, **SAMPLED}
    plain = client_of_both.completions.create(**body)  # type: ignore[call-overload]
    fim = httpx.post(f"{url_of_both}/v1/fim/completions", json=body).json()
    assert (fim["object"], fim["choices"][0]["text"]) == ("text_completion", plain.choices[0].text)
    several = httpx.post(f"{url_of_both}/v1/fim/completions", json={**body, "prompt": ["a", "b"]})
    assert (several.status_code, several.json()["error"]["param"]) == (400, "prompt")


def prompts(service: CompletionService) -> Prompts:
    model = service.model
    return Prompts(model.config, model.tokenizer, model.chat, model.max_tokens)


@pytest.mark.parametrize("prefix", ["a" * size for size in range(1, 18)])
def test_a_block_causal_hole_ends_where_the_suffix_shows(service: CompletionService, prefix: str) -> None:
    said = FimBody(model="tiny", prompt=prefix, suffix="bcdefghijk", max_tokens=10)
    unsaid = FimBody(model="tiny", prompt=prefix, suffix="bcdefghijk")
    asked, chosen = prompts(service).of(said)[0], prompts(service).of(unsaid)[0]
    # Asked for: kept, but for one position where the suffix would begin a block (of 8) of its own.
    assert asked.max_tokens == (9 if (len(prefix) + 10) % 8 == 0 else 10)
    assert (len(prefix) + chosen.max_tokens) % 8 == 1
    assert 24 - 7 <= chosen.max_tokens <= 24
    assert len(chosen.suffix_ids) == 7
    for prompt in (asked, chosen):
        assert (prompt.num_tokens + prompt.max_tokens) % 8 == 0
        request = Request("r", prompt.ids, DecodePolicy(), prompt.max_tokens, suffix_ids=prompt.suffix_ids)
        request.validate(service.model.config)


def test_a_suffix_without_a_block_to_share_is_refused(url_of_both: str) -> None:
    body = {"model": "tiny", "prompt": "a" * 7, "suffix": "bc", "max_tokens": 1}
    response = httpx.post(f"{url_of_both}/v1/fim/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "suffix")


@pytest.mark.parametrize("model", ["tiny", "both"])
@pytest.mark.parametrize("endpoint", ["apply", "edit"])
def test_apply_and_edit_stream_what_they_answer(url_of_both: str, model: str, endpoint: str) -> None:
    body = {"model": model, "messages": user(APPLY if endpoint == "apply" else EDIT), **SAMPLED}
    target = f"{url_of_both}/v1/{endpoint}/completions"
    response = httpx.post(target, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["object"] == "chat.completion"
    text = answer["choices"][0]["message"]["content"]
    streamed = httpx.post(target, json={**body, "stream": True}).text
    assert text == "".join(contents(streamed))
    if endpoint == "edit":
        assert text.startswith("```\n")
        assert text.endswith("\n```")


def contents(stream: str) -> list[str]:
    events = [json.loads(event[6:]) for event in stream.split("\n\n")[:-2]]
    return [event["choices"][0]["delta"].get("content") or "" for event in events]


def test_edit_is_infill_between_what_stands_before_and_after(bidirectional: CompletionService) -> None:
    body = EditBody(model="both", messages=[Message(role="user", content=EDIT)])
    prompt = prompts(bidirectional).of(body)[0]
    decode = bidirectional.model.tokenizer.decode
    before, after = decode(list(prompt.ids)), decode(list(prompt.suffix_ids))
    # The tokenizer has no line breaks.
    assert before.startswith("[user] Recently viewed code:b.py:```SEEN = 1```Recent edits")
    assert "part of a.py" in before
    assert "def f(<|cursor|>x):    pass" in before
    assert before.endswith(">```import b")
    assert after == "print(f(b))```"
    assert prompt.max_tokens == len("def f(x):    pass") + 32
    assert (prompt.opening, prompt.closing) == ("```\n", "\n```")


def test_apply_shows_both_parts_and_stops_at_the_fence(bidirectional: CompletionService) -> None:
    body = ApplyBody(model="both", messages=[Message(role="user", content=APPLY)], max_tokens=7)
    prompt = prompts(bidirectional).of(body)[0]
    text = bidirectional.model.tokenizer.decode(list(prompt.ids))
    assert "```def f(x): return x```" in text
    assert "```// ... existing code ...def g(x): return 2```" in text
    assert text.endswith(">```")
    assert (prompt.max_tokens, prompt.suffix_ids, prompt.stop) == (7, (), ("\n```",))


def test_code_with_a_fence_gets_a_longer_one(bidirectional: CompletionService) -> None:
    text = APPLY.replace("return x", "````").replace("return 2", "``")
    body = ApplyBody(model="both", messages=[Message(role="user", content=text)])
    assert prompts(bidirectional).of(body)[0].stop == ("\n`````",)


@pytest.mark.parametrize("endpoint", ["apply", "edit"])
@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (user("plain text"), "messages.0.content"),
        ([*user(APPLY), *user(APPLY)], "messages"),
        ([{"role": "system", "content": APPLY}], "messages"),
    ],
)
def test_what_is_not_a_tagged_message_is_named(
    url_of_both: str, endpoint: str, messages: list[dict[str, str]], param: str
) -> None:
    body = {"model": "both", "messages": messages}
    response = httpx.post(f"{url_of_both}/v1/{endpoint}/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_mask_token_in_a_chat_is_a_fault_of_its_messages(client_of_both: OpenAI, url_of_both: str) -> None:
    body = {"model": "both", "messages": user("a<|mask|>b")}
    error = httpx.post(f"{url_of_both}/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "messages"


def test_tokenize_is_what_a_prompt_costs(url_of_both: str, client_of_both: OpenAI) -> None:
    def tokenized(**fields: Any) -> dict[str, Any]:
        response = httpx.post(
            f"{url_of_both}/tokenize", json={"model": "both", "return_token_strs": True, **fields}
        )
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    text = tokenized(prompt="def f")
    assert text["token_strs"] == list("def f")
    assert (text["count"], text["max_model_len"]) == (5, 2048)
    usage = client_of_both.completions.create(model="both", prompt=text["tokens"], max_tokens=3).usage
    assert usage is not None
    assert usage.prompt_tokens == 5
    assert tokenized(prompt="def f", return_token_strs=False)["token_strs"] is None
    long = {"model": "both", "prompt": "a" * 2049, "return_token_strs": True}
    refused = httpx.post(f"{url_of_both}/tokenize", json=long)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "return_token_strs")
    assert tokenized(prompt="a" * 2049, return_token_strs=False)["count"] == 2049
    chat = tokenized(messages=user("hi"))
    assert "".join(chat["token_strs"]) == "[user] hi>"
    for fields in ({}, {"prompt": "a", "messages": user("a")}):
        refused = httpx.post(f"{url_of_both}/tokenize", json={"model": "both", **fields})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


def test_both_models_are_listed_and_ready(url_of_both: str, client_of_both: OpenAI) -> None:
    assert [model.id for model in client_of_both.models.list()] == ["tiny", "both"]
    ready = httpx.get(f"{url_of_both}/ready")
    assert (ready.status_code, ready.json()) == (
        200, {"ready": True, "models": {"tiny": True, "both": True}},
    )  # fmt: skip
    health = httpx.get(f"{url_of_both}/health").json()
    assert health["forwards"] == sum(stats["forwards"] for stats in health["models"].values())
    answer = {
        model: client_of_both.completions.create(model=model, prompt="abc", **SAMPLED).choices[0].text
        for model in ("tiny", "both")
    }
    assert answer["tiny"] != answer["both"]


def test_completion_bodies_default_to_no_suffix(service: CompletionService) -> None:
    assert prompts(service).of(CompletionBody(model="tiny", prompt="ab"))[0].suffix_ids == ()
