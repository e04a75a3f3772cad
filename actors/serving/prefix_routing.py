"""Which replica a request goes to: one that has its prompt's beginning cached, unless another is far less busy.

Ray Serve's proxy chooses a replica before it reads the body. `PrefixHeader` runs in the proxy, in front of that: it reads the
body, names the prompt's beginning by a digest, and writes it into the header by which Serve knows sessions.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, MutableMapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREFIX_CHARACTERS = 256
"""Of a prompt, that decide its home: some 64 tokens, so several blocks of every family."""
SESSION_HEADER = b"x-session-id"
_BODY_BYTES = 2**20  # a longer body is not looked into
_BODY_S = 2.0  # a client that sends more slowly is not waited for


def prefix_key(body: bytes) -> str:
    """The digest of model and prompt's beginning; empty where there is no prompt to be seen.

    Two bodies with one model and the same first PREFIX_CHARACTERS of text (as many tokens of a prompt of ids) have one key.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(fields, dict):
        return ""
    beginning = _beginning(fields)
    if not beginning:
        return ""
    text = json.dumps([fields.get("model"), beginning], default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _beginning(fields: Mapping[str, Any]) -> list[Any]:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str | list):
        return [prompt[:PREFIX_CHARACTERS]] if prompt else []
    messages, found, left = fields.get("messages"), list[Any](), PREFIX_CHARACTERS
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict) or left <= 0:
            break
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content)
        found += [message.get("role"), text[:left]]
        left -= len(text)
    return found


def home_of(key: str, replicas: list[str]) -> str:
    """The replica with the highest digest of (key, its name): when replicas come or go, only their own keys move.

    Rendezvous hashing (Thaler and Ravishankar, 1998).
    """
    return max(replicas, key=lambda name: (blake2b(f"{key}/{name}".encode(), digest_size=8).digest(), name))


def order(
    loads: Mapping[str, float], random: np.random.Generator, key: str = "", slack_s: float = 0.0
) -> list[str]:
    """Two replicas, the one to be asked first in front (the power of two choices); one where there is one.

    With a key one of the two is the key's home, which comes first as long as it has at most `slack_s` seconds of work more
    than the other, a random one: a beginning that everybody has does not make its home drown.

    Args:
        loads: seconds of work left, by replica; at least one.
    """
    names = sorted(loads)
    if len(names) == 1:
        return names
    first = home_of(key, names) if key else names[int(random.integers(len(names)))]
    others = [name for name in names if name != first]
    second = others[int(random.integers(len(others)))]
    return [first, second] if loads[first] <= loads[second] + (slack_s if key else 0.0) else [second, first]


class PrefixHeader:
    """ASGI middleware: adds `SESSION_HEADER` to a POST request that has none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or _has_session(scope):
            await self._app(scope, receive, send)
            return
        read, whole = await _read(receive)
        key = prefix_key(b"".join(message.get("body", b"") for message in read)) if whole else ""
        if key:
            scope = {**scope, "headers": [*scope["headers"], (SESSION_HEADER, key.encode())]}
        again = iter(read)

        async def replay() -> Message:
            for message in again:
                return message
            return await receive()

        await self._app(scope, replay, send)


def proxy_middlewares() -> list[Any]:
    """What Ray Serve's proxy asks for (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    from starlette.middleware import Middleware

    return [Middleware(PrefixHeader)]


def _has_session(scope: MutableMapping[str, Any]) -> bool:
    # As Serve reads it: some proxies in between write `_` for `-`.
    return any(name.lower().replace(b"_", b"-") == SESSION_HEADER for name, _ in scope["headers"])


async def _read(receive: Receive) -> tuple[list[Message], bool]:
    """Messages of a body, and whether they are all of it."""
    read: list[Message] = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_S):
            while size <= _BODY_BYTES:
                message = await receive()
                read.append(message)
                if message["type"] != "http.request":
                    return read, False
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return read, size <= _BODY_BYTES
    except TimeoutError:
        pass
    return read, False
