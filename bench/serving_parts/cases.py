"""Requests that nobody should send, keyed by number: raw bytes, hostile text, giant fields, wrong types, odd headers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewstep.platform.rng import generator

ENDPOINTS = (
    "/v1/completions", "/v1/chat/completions", "/v1/fim/completions", "/v1/edit/completions", "/v1/apply/completions",
    "/tokenize", "/v1/models", "/v1/models/x", "/health", "/ready", "/metrics", "/",
)  # fmt: skip
HOSTILE = (
    "", "\x00", "\ud800", "\udfff\ud800", "\u202e\u2066", "a\u0301" * 50, "😀" * 40, "\ufeff", "\ufffe", "\r\n\r\n",
    "<|mask|>", "<|eos|><|pad|>", "data: [DONE]\n\n", "{{ 7*7 }}", "../../etc/passwd", "%00%ff", "İıß" * 20, "\x1b[2J",
    "\U000e0001" * 10, "\u2028\u2029", "' OR 1=1 --", "𝕬" * 30, "ﷺ" * 20, "\t" * 200,
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -1e308, 1e-320, 0.5, -0.0, 1.0, 3.0, 128, 129, 32_768,
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "n", "best_of", "seed", "stop", "temperature", "top_p", "max_tokens", "stream",
    "stream_options", "user", "fewstep", "suffix", "echo", "logprobs", "logit_bias", "response_format", "tools",
    "max_completion_tokens", "diffusing", "priority", "presence_penalty", "metadata", "functions", "text", "edits",
)  # fmt: skip
OPTIONS = (
    "kind", "threshold", "tokens_per_step", "entropy_bound", "factor", "block_size", "cache", "refresh_every",
    "edit_threshold", "max_edit_steps", "max_steps_per_block", "canvas", "return_trajectory", "priority",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One request. `raw` is sent as it is, past any HTTP library."""

    kind: str
    method: str = "POST"
    path: str = "/v1/completions"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None


def make_case(number: int, model: str, paths: Sequence[str] = ENDPOINTS, seed: int = 0) -> Case:
    """Case `number`; the same number is the same case."""
    draws = generator(seed, "fuzz", number)
    path = str(draws.choice(np.array(paths, object)))
    kinds = (_typed, _typed, _typed, _hostile, _mutated, _mutated, _raw_body, _giant, _headers, _wire)
    return kinds[int(draws.integers(len(kinds)))](draws, path, model)


def _valid(draws: np.random.Generator, path: str, model: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": int(draws.integers(1, 24)),
        "stream": bool(draws.random() < 0.5),
    }
    text = "def f(xs):\n    " + str(draws.choice(np.array(HOSTILE, object)))
    if "chat" in path:
        return {**body, "messages": [{"role": "user", "content": text}]}
    return {**body, "prompt": text}


def _value(draws: np.random.Generator, depth: int = 0) -> Any:
    kind = int(draws.integers(8 if depth < 3 else 5))
    if kind == 0:
        return NUMBERS[int(draws.integers(len(NUMBERS)))]
    if kind == 1:
        return HOSTILE[int(draws.integers(len(HOSTILE)))]
    if kind in (2, 3):
        return (None, True, False, "auto", "threshold", "static", "dual", "none", "text", "user")[
            int(draws.integers(10))
        ]
    if kind == 4:
        return int(draws.integers(0, 40))
    if kind == 5:
        return [_value(draws, depth + 1) for _ in range(int(draws.integers(4)))]
    if kind == 6:
        return {str(draws.choice(OPTIONS)): _value(draws, depth + 1) for _ in range(int(draws.integers(4)))}
    return {"role": _value(draws, 3), "content": _value(draws, depth + 1)}


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def _typed(draws: np.random.Generator, path: str, model: str) -> Case:
    """A valid body with a few fields of any type and value."""
    body = _valid(draws, path, model)
    for _ in range(int(draws.integers(1, 4))):
        if draws.random() < 0.3:
            body["fewstep"] = {str(draws.choice(OPTIONS)): _value(draws, 2)}
        else:
            body[str(draws.choice(FIELDS))] = _value(draws)
    # Long answers are the load test's business.
    if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 64:
        body["n"] = 1
    return Case("typed", path=path, body=_dumps(body))


def _hostile(draws: np.random.Generator, path: str, model: str) -> Case:
    """Hostile text wherever text may stand, as escapes or as raw UTF-8, surrogates included."""
    body = _valid(draws, path, model)
    for name in ("stop", "user", "model", "suffix"):
        if draws.random() < 0.3:
            body[name] = HOSTILE[int(draws.integers(len(HOSTILE)))]
    text = json.dumps(body, ensure_ascii=bool(draws.random() < 0.5))
    return Case("hostile", path=path, body=text.encode("utf-8", "surrogatepass"))


def _mutated(draws: np.random.Generator, path: str, model: str) -> Case:
    """A valid body with bytes flipped, cut, doubled or put in."""
    body = bytearray(_dumps(_valid(draws, path, model)))
    for _ in range(int(draws.integers(1, 6))):
        at, kind = int(draws.integers(max(1, len(body)))), int(draws.integers(4))
        if kind == 0 and body:
            body[at] = int(draws.integers(256))
        elif kind == 1:
            del body[at:]
        elif kind == 2:
            body[at:at] = body[at : at + 20]
        else:
            body[at:at] = draws.bytes(3)
    return Case("mutated", path=path, body=bytes(body))


def _raw_body(draws: np.random.Generator, path: str, model: str) -> Case:
    method = str(draws.choice(["POST", "POST", "GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]))
    return Case("raw body", method, path, draws.bytes(int(draws.integers(0, 400))))


def _giant(draws: np.random.Generator, path: str, model: str) -> Case:
    """Fields far above any sense: long, many, deep, or of very many digits."""
    kind, size = int(draws.integers(7)), int(draws.choice([1000, 30_000, 400_000]))
    body = _valid(draws, path, model)
    if kind == 0:
        body["prompt"] = "x" * size
    elif kind == 1:
        body["prompt"] = [int(token) for token in draws.integers(0, 200, min(size, 30_000))]
    elif kind == 2:
        return Case("giant", path=path, body=b'{"a":' * min(size, 30_000) + b"1" + b"}" * min(size, 30_000))
    elif kind == 3:
        return Case("giant", path=path, body=b"[" * size)
    elif kind == 4:
        body = {**body, **{f"field{index}": index for index in range(min(size, 5000))}}
    elif kind == 5:
        return Case("giant", path=path, body=b'{"n": ' + b"9" * min(size, 30_000) + b"}")
    else:
        body["messages"] = [{"role": "user", "content": "y" * 20}] * min(size, 5000)
    return Case("giant", path=path, body=_dumps(body))


def _headers(draws: np.random.Generator, path: str, model: str) -> Case:
    names = (
        "content-type",
        "authorization",
        "x-fewstep-deadline-s",
        "traceparent",
        "accept",
        "x-request-id",
        "host",
    )
    values = (
        "", "text/plain", "Bearer ", "Bearer fs-000000000000-x", "é\xff", "0", "-1", "nan", "1e400", "0.001", "a" * 4000,
        "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "application/json; charset=utf-7", "multipart/form-data; boundary=",
    )  # fmt: skip
    chosen = {
        names[int(draws.integers(len(names)))]: values[int(draws.integers(len(values)))]
        for _ in range(int(draws.integers(1, 4)))
    }
    return Case("headers", path=path, body=_dumps(_valid(draws, path, model)), headers=chosen)


def _wire(draws: np.random.Generator, path: str, model: str) -> Case:
    """Bytes that are nearly HTTP, or not at all."""
    body = _dumps(_valid(draws, path, model))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\n".encode()
    raws = (
        draws.bytes(200),
        head + b"content-length: 999999\r\n\r\n" + body,
        head + b"content-length: -5\r\n\r\n" + body,
        head + b"content-length: abc\r\n\r\n" + body,
        head + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + body,
        head + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        head + f"content-length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2],
        b"GET " + b"/" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        f"POST {path}?{'q=1&' * 200}%zz HTTP/1.0\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body,
        b"POST /v1/models/%2e%2e/%ff%00 HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
    )
    return Case("wire", raw=raws[int(draws.integers(len(raws)))], path=path)
