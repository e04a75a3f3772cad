"""The stream contract of docs/serving.md: what is added up, what replaces, and what leaving costs."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import httpx
import pytest
from openai import OpenAI
from tests.actors.serving.tiny import build_tokenizer, tiny_model

from fewstep.actors.engine.request import CanvasView, Request, Update
from fewstep.actors.serving.answers import Tally
from fewstep.actors.serving.canvas_events import canvas_fields, piece_texts
from fewstep.kernels.model.checkpoint import embedded_model
from fewstep.kernels.model.config import AttentionKind, ModelConfig
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.platform.records import DecodePolicy

SAMPLED: dict[str, Any] = {"model": "tiny", "temperature": 1.0, "seed": 11, "max_tokens": 40}
PATHS = {
    "/v1/completions": {"prompt": ["abc", "xyz"], "n": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}], "n": 2},
}


def chunks_of(url: str, path: str, **fields: Any) -> list[dict[str, Any]]:
    body = {**SAMPLED, **PATHS[path], "stream": True, **fields}
    response = httpx.post(url + path, json=body)
    assert response.status_code == 200, response.text
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(choice: dict[str, Any]) -> str:
    return str(choice.get("text", choice.get("delta", {}).get("content")) or "")


def whole_texts(url: str, path: str) -> list[str]:
    answer = httpx.post(url + path, json={**SAMPLED, **PATHS[path]}).json()
    return [str(choice.get("text", choice.get("message", {}).get("content"))) for choice in answer["choices"]]


@pytest.mark.parametrize("path", PATHS)
def test_committed_deltas_are_the_same_with_and_without_canvases(url: str, path: str) -> None:
    plain, watched = chunks_of(url, path), chunks_of(url, path, diffusing=True)
    assert not any("fewstep" in chunk for chunk in plain)
    pieces = [(chunk["choices"][0]["index"], text_of(chunk["choices"][0])) for chunk in plain]
    shown = [chunk for chunk in watched if "fewstep" not in chunk]
    assert sorted((chunk["choices"][0]["index"], text_of(chunk["choices"][0])) for chunk in shown) == sorted(
        pieces
    )
    for index, text in enumerate(whole_texts(url, path)):
        assert "".join(piece for owner, piece in pieces if owner == index) == text
    canvases = [chunk for chunk in watched if "fewstep" in chunk]
    assert len(canvases) > len(whole_texts(url, path)) * 5
    for chunk in canvases:
        choice = chunk["choices"][0]
        assert (text_of(choice), choice["finish_reason"]) == ("", None)
        assert choice.get("delta", {}) == {}


@pytest.mark.parametrize("path", PATHS)
def test_canvases_grow_one_revision_a_forward_into_the_text(url: str, path: str) -> None:
    watched = chunks_of(url, path, diffusing=True, stream_options={"include_usage": True})
    texts = whole_texts(url, path)
    num_revisions = 0
    for index, whole in enumerate(texts):
        own = [
            chunk["fewstep"]["canvas"]
            for chunk in watched
            if "fewstep" in chunk and chunk["choices"][0]["index"] == index
        ]
        assert [canvas["revision"] for canvas in own] == list(range(1, len(own) + 1))
        num_revisions += len(own)
        for canvas in own:
            # A token is a character here, and the special ones show nothing.
            for place, token in enumerate(canvas["tokens"]):
                assert token["state"] in ("committed", "provisional", "mask")
                assert (token["text"] == "") >= (token["state"] == "mask")
                if token["state"] == "committed" and "" not in [t["text"] for t in canvas["tokens"]]:
                    expected = whole[canvas["start"] + place : canvas["start"] + place + 1]
                    assert token["text"] == expected or len(whole) < 40
        for before, after in pairwise(own):
            if before["start"] == after["start"]:
                kept = [token for token in before["tokens"] if token["state"] == "committed"]
                assert len(kept) < len([t for t in after["tokens"] if t["state"] == "committed"]) or len(
                    after["tokens"]
                ) < len(before["tokens"])
        assert {token["state"] for canvas in own for token in canvas["tokens"]} >= {
            "committed",
            "provisional",
        }
    usage = watched[-1]["usage"]["fewstep"]
    assert usage["forwards"] == num_revisions
    assert usage["time_to_first_block_s"] > 0


@pytest.mark.parametrize("path", PATHS)
def test_whole_texts_replace_and_end_in_the_text(url: str, path: str) -> None:
    watched = chunks_of(url, path, diffusing=True, fewstep={"canvas": "whole_text"})
    texts = whole_texts(url, path)
    for index, whole in enumerate(texts):
        own = [chunk for chunk in watched if chunk["choices"][0]["index"] == index and "fewstep" in chunk]
        assert [chunk["fewstep"]["canvas"]["revision"] for chunk in own] == list(range(1, len(own) + 1))
        assert text_of(own[-1]["choices"][0]) == whole
        assert own[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in own[:-1])
        assert len({text_of(chunk["choices"][0]) for chunk in own}) > 3


def test_a_stop_string_ends_whole_texts_too(url: str) -> None:
    path = "/v1/completions"
    whole = whole_texts(url, path)[0]
    stop = whole[10:12]
    chunks = chunks_of(
        url, path, prompt="abc", n=1, diffusing=True, stop=stop, fewstep={"canvas": "whole_text"}
    )
    assert text_of(chunks[-1]["choices"][0]) == whole[: whole.index(stop)]


def test_the_clients_objects_carry_the_canvas(client: OpenAI) -> None:
    stream = client.completions.create(prompt="abc", stream=True, extra_body={"diffusing": True}, **SAMPLED)
    canvases = [chunk.model_extra["fewstep"]["canvas"] for chunk in stream if chunk.model_extra]
    assert canvases[0]["revision"] == 1
    assert canvases[0]["start"] == 0
    assert len(canvases[0]["tokens"]) == 5  # what the prompt's three leave of a block of eight


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"diffusing": True}, "diffusing"),
        ({"stream": True, "fewstep": {"canvas": "blocks"}}, "fewstep.canvas"),
        ({"stream": True, "diffusing": True, "fewstep": {"canvas": "all"}}, "fewstep.canvas"),
        ({"stream": True, "diffusing": 1}, "diffusing"),
    ],
)
def test_a_canvas_nobody_would_see_is_refused(url: str, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "abc", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_pieces_of_characters_belong_to_the_token_that_completes_them() -> None:
    folder = embedded_model()
    tokenizer = load_tokenizer(folder, ModelConfig.load(folder))
    # Long enough for several pieces that are decoded by themselves.
    text = "def f(é):\n    return 'ß€𝄞'" * 5
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for cut in range(len(ids)):
        pieces = piece_texts(tokenizer, ids[cut:], ids[:cut])
        assert "".join(piece_texts(tokenizer, ids[:cut]) + pieces).replace("�", "") in text
        assert len(pieces) == len(ids) - cut
    assert "".join(piece_texts(tokenizer, ids)) == text
    assert "" in piece_texts(tokenizer, ids)


def test_a_proposal_without_text_is_a_mask() -> None:
    tokenizer = build_tokenizer()
    view = CanvasView(2, 3, (), (1, 10, 1), ("provisional", "provisional", "committed"))
    assert [token["state"] for token in canvas_fields(tokenizer, view)["tokens"]] == [
        "mask",
        "provisional",
        "committed",
    ]


@pytest.mark.parametrize(("kind", "size"), [("block_causal", 5), ("bidirectional", 8)])
def test_the_first_block_is_there_when_all_of_it_is(kind: AttentionKind, size: int) -> None:
    config = tiny_model(build_tokenizer(), attention_kind=kind).config
    # Two clocks a second apart: what is measured counts from the earlier.
    tally = Tally([Request("r", (5, 6, 7), DecodePolicy(), 20)], config, time.monotonic() - 1)
    for _ in range(size - 1):
        tally.add(0, Update("r", "a", 1))
    assert tally.first_block_s is None
    tally.add(0, Update("r", "a", 1))
    first = tally.first_block_s
    assert first is not None
    assert first >= 1
    tally.add(0, Update("r", "a", 1))
    assert tally.first_block_s == first
