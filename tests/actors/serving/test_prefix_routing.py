"""A prompt's beginning has one home; the proxy's middleware names it and passes every body on unchanged."""

from __future__ import annotations

import asyncio
import json
import string
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.actors.serving import prefix_routing
from fewstep.actors.serving.prefix_routing import (
    PREFIX_CHARACTERS,
    SESSION_HEADER,
    PrefixHeader,
    home_of,
    order,
    prefix_key,
)

NAMES = st.lists(
    st.text(string.ascii_lowercase, min_size=1, max_size=8), min_size=1, max_size=12, unique=True
)


def key_of(**fields: Any) -> str:
    return prefix_key(json.dumps(fields).encode())


@given(st.text(min_size=PREFIX_CHARACTERS, max_size=400), st.text(), st.text(), st.floats(0, 2))
def test_bodies_with_one_beginning_have_one_key_whatever_else_they_say(
    prompt: str, one: str, other: str, temperature: float
) -> None:
    assert key_of(model="m", prompt=prompt + one) == key_of(
        temperature=temperature, prompt=prompt + other, model="m"
    )
    assert key_of(model="m", prompt=prompt) != key_of(model="n", prompt=prompt)
    assert key_of(model="m", prompt=prompt) != key_of(model="m", prompt="+" + prompt)
    system = {"role": "system", "content": prompt}
    chats = [[system, {"role": "user", "content": text}] for text in (one, other)]
    assert len({key_of(model="m", messages=chat) for chat in chats}) == 1
    assert key_of(model="m", messages=chats[0]) != key_of(model="m", messages=[{**system, "role": "user"}])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_json_has_a_key_or_none_and_never_fails(found: Any) -> None:
    for fields in (found, {"prompt": found}, {"messages": found}, {"messages": [{"content": found}]}):
        assert isinstance(prefix_key(json.dumps(fields).encode()), str)


@given(st.binary())
def test_no_body_fails(body: bytes) -> None:
    assert isinstance(prefix_key(body), str)


def test_token_ids_several_prompts_and_bodies_without_a_prompt() -> None:
    ids = list(range(PREFIX_CHARACTERS))
    assert key_of(prompt=[*ids, 1]) == key_of(prompt=[*ids, 2]) == key_of(prompt=[[*ids, 3], [7]]) != ""
    assert (
        key_of(prompt="")
        == key_of(prompt=[])
        == key_of(model="m")
        == prefix_key(b"[1]")
        == prefix_key(b"{")
        == ""
    )
    assert prefix_key(b"[" * 100_000) == ""


@given(st.text(), NAMES, st.text("0123456789", min_size=1))
def test_a_newcomer_takes_keys_and_moves_none_between_the_others(
    key: str, names: list[str], new: str
) -> None:
    home = home_of(key, names)
    assert home in names
    assert home == home_of(key, names[::-1])
    assert home_of(key, [*names, new]) in (home, new)


def test_keys_are_spread_evenly() -> None:
    names = [f"replica{number}" for number in range(8)]
    counts = Counter(home_of(str(number), names) for number in range(8000))
    assert min(counts.values()) > 800
    assert max(counts.values()) < 1200


@given(
    st.dictionaries(st.text(string.ascii_lowercase, min_size=1), st.floats(0, 100), min_size=1),
    st.text(),
    st.floats(0, 50),
    st.integers(0, 99),
)
def test_the_first_has_no_more_work_than_the_second_but_a_home_may_by_its_slack(
    loads: dict[str, float], key: str, slack_s: float, seed: int
) -> None:
    found = order(loads, np.random.default_rng(seed), key, slack_s)
    assert len(found) == len(set(found)) == min(2, len(loads))
    if len(found) == 1:
        return
    home = home_of(key, sorted(loads)) if key else None
    if home is not None:
        assert home in found
        other = next(name for name in found if name != home)
        assert (found[0] == home) == (loads[home] <= loads[other] + slack_s)
    else:
        assert loads[found[0]] <= loads[found[1]]


async def _pass(
    chunks: list[bytes], headers: list[tuple[bytes, bytes]], method: str = "POST"
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body as the application behind the middleware gets them."""
    sent = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    sent.append({"type": "http.request", "body": b"", "more_body": False})
    seen: list[Any] = []

    async def receive() -> Any:
        return sent.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    async def app(scope: Any, take: Any, _: Any) -> None:
        body, more = b"", True
        while more:
            message = await take()
            body, more = body + message["body"], message["more_body"]
        seen.extend([scope["headers"], body])

    await PrefixHeader(app)({"type": "http", "method": method, "headers": headers}, receive, send)
    assert sent == []
    return seen[0], seen[1]


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_the_middleware_passes_any_body_on(chunks: list[bytes]) -> None:
    _, body = asyncio.run(_pass(chunks, []))
    assert body == b"".join(chunks)


def test_the_middleware_names_the_beginning_where_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"model": "m", "prompt": "hello"}).encode()
    chunks = [text[:9], text[9:]]
    key = (SESSION_HEADER, prefix_key(text).encode())
    assert asyncio.run(_pass(chunks, [(b"accept", b"*/*")])) == ([(b"accept", b"*/*"), key], text)
    own = [(b"X_Session-Id", b"mine")]
    assert asyncio.run(_pass(chunks, own)) == (own, text)
    assert asyncio.run(_pass(chunks, [], "PUT")) == ([], text)
    monkeypatch.setattr(prefix_routing, "_BODY_BYTES", len(text) - 1)
    assert asyncio.run(_pass(chunks, [])) == ([], text)


def test_a_client_that_sends_slowly_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_routing, "_BODY_S", 0.05)
    called = asyncio.Event()

    async def main() -> list[bytes]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        queue.put_nowait({"type": "http.request", "body": b'{"prompt":', "more_body": True})
        bodies: list[bytes] = []

        async def app(scope: Any, receive: Any, _: Any) -> None:
            assert scope["headers"] == []
            called.set()
            bodies.extend([(await receive())["body"], (await receive())["body"]])

        async def late() -> None:
            await called.wait()
            await queue.put({"type": "http.request", "body": b'"x"}', "more_body": False})

        sender = asyncio.create_task(late())
        await PrefixHeader(app)({"type": "http", "method": "POST", "headers": []}, queue.get, None)  # type: ignore[arg-type]
        await sender
        return bodies

    assert asyncio.run(main()) == [b'{"prompt":', b'"x"}']
