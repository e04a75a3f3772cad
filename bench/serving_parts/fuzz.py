"""Thousands of requests that nobody should send: no answer may be a 5xx, and nothing may stay in use."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import aiohttp
import httpx
from bench.serving_parts.cases import ENDPOINTS, Case, make_case
from bench.serving_parts.described import send_described
from bench.serving_parts.replicas import left_behind

from fewstep.cluster.deploy import ServeConfig, serve_model

CLIENTS = 8
TIMEOUT_S = 60.0
WIRE_S = 2.0
SHOWN = 20
DESCRIBED = 0.2
"""Share of the requests that schemathesis makes of the OpenAPI document; ours are wilder, and eight at a time."""


def measure(requests: int, seed: int = 0) -> dict[str, Any]:
    """Send so many cases; the failing ones are named by number, so that they can be sent again."""
    with serve_model(
        ServeConfig(port=0, max_sequences=32, max_tokens=32, log={"file": "/dev/null"})
    ) as endpoint:
        paths = _paths(endpoint.url)
        run = _Run(endpoint.url, endpoint.model, paths, seed)
        statuses, failures = send_described(endpoint.url, endpoint.model, round(DESCRIBED * requests), seed)
        asyncio.run(run.all(max(0, requests - statuses.total())))
        left = left_behind(endpoint.url)
    failures = [*failures, *run.failures]
    return {
        "requests": statuses.total() + run.statuses.total(),
        "errors_5xx": len(failures),
        "leaked_pages": left["pages"],
        "left_behind": left,
        "statuses": {str(status): count for status, count in sorted((statuses + run.statuses).items())},
        "kinds": {**dict(sorted(run.kinds.items())), "described": statuses.total()},
        "failures": failures[:SHOWN],
        "settings": {"clients": CLIENTS, "seed": seed, "paths": list(paths)},
    }


def _paths(url: str) -> tuple[str, ...]:
    """Every path of the server's own description and ours that is there; those that take a body four times."""
    answer = httpx.get(f"{url}/openapi.json", timeout=30)
    described = list(answer.json().get("paths", {})) if answer.status_code == 200 else []
    found: list[str] = []
    for path in dict.fromkeys([*ENDPOINTS, *described]):
        status = httpx.post(url + path, content=b"{}", timeout=30).status_code
        found += [path] * ({404: 0, 405: 1}.get(status, 4))
    return tuple(found)


class _Run:
    def __init__(self, url: str, model: str, paths: tuple[str, ...], seed: int) -> None:
        self._url, self._model, self._paths, self._seed = url, model, paths, seed
        self.statuses: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []

    async def all(self, requests: int) -> None:
        numbers = iter(range(requests))
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:

            async def client() -> None:
                for number in numbers:
                    await self._one(session, number)

            await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def _one(self, session: aiohttp.ClientSession, number: int) -> None:
        case = make_case(number, self._model, self._paths, self._seed)
        self.kinds[case.kind] += 1
        try:
            status, text = await (self._wire(case) if case.raw is not None else self._send(session, case))
        except ValueError:
            status, text = -1, "the client refused to send it"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            status, text = 0, type(error).__name__
        self.statuses[status] += 1
        # No answer to whole HTTP is as bad as a wrong one; to half a request it is the only right one.
        if status >= 500 or (status == 0 and case.raw is None) or '"server_error"' in text:
            self.failures.append({"number": number, "kind": case.kind, "path": case.path, "status": status,
                                  "answer": text[-300:]})  # fmt: skip

    async def _send(self, session: aiohttp.ClientSession, case: Case) -> tuple[int, str]:
        headers = {"content-type": "application/json", **case.headers}
        async with session.request(
            case.method, self._url + case.path, data=case.body, headers=headers, allow_redirects=False
        ) as response:
            return response.status, (await response.read()).decode(errors="replace")

    async def _wire(self, case: Case) -> tuple[int, str]:
        host, _, port = self._url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(case.raw or b"")
            await writer.drain()
            async with asyncio.timeout(WIRE_S):
                text = (await reader.read(65_536)).decode(errors="replace")
        except TimeoutError:
            text = ""  # waits for the rest, as it should
        finally:
            writer.close()
        words = text.split(" ", 2)
        return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), text
