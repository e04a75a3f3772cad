"""Clients that load a server: they send what they are told to, when they are told to, and write down what they see."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import aiohttp

from fewstep.pipelines.load_summary import Sample

_DATA, _DONE = b"data: ", b"data: [DONE]"
_SHOWN = 120


class LoadClient:
    """Sends requests to one endpoint and times their answers.

    Args:
        address: where requests are posted.
        bodies: of the requests, in order.
        delays: after how many seconds the client of a request leaves; None = it stays.
        on_end: called after each request.
    """

    def __init__(
        self,
        address: str,
        bodies: Iterator[dict[str, Any]],
        delays: Sequence[float | None],
        *,
        headers: dict[str, str],
        timeout_s: float,
        on_end: Callable[[Sample], None] = lambda _: None,
    ) -> None:
        self._address, self._bodies, self._delays, self._on_end = address, bodies, delays, on_end
        self._headers, self._timeout = headers, aiohttp.ClientTimeout(total=timeout_s)
        self.samples: list[Sample] = []
        self._started = time.perf_counter()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    async def closed_loop(self, clients: int, requests: int, seconds: float | None) -> None:
        """So many clients, each with one request at a time, until all requests are sent or the time is over."""
        async with self._session() as session:
            self._started = time.perf_counter()

            def more() -> bool:
                return self.now < seconds if seconds is not None else len(self.samples) < requests

            async def client() -> None:
                while more():
                    await self._request(session, self.now)

            await asyncio.gather(*(client() for _ in range(clients)))

    async def open_loop(self, due: Sequence[float]) -> None:
        """A request at each moment of `due`, whatever has become of the others."""
        async with self._session() as session, asyncio.TaskGroup() as group:
            self._started = time.perf_counter()
            for moment in due:
                await asyncio.sleep(max(0.0, moment - self.now))
                group.create_task(self._request(session, moment))

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout, headers=self._headers
        )

    async def _request(self, session: aiohttp.ClientSession, due: float) -> None:
        sample = Sample(due)
        delay = self._delays[len(self.samples) % len(self._delays)] if self._delays else None
        body = next(self._bodies)
        self.samples.append(sample)
        sample.sent = self.now
        try:
            async with asyncio.timeout(delay):
                async with session.post(self._address, json=body) as response:
                    sample.status = response.status
                    await self._read(response, sample)
        except TimeoutError:
            sample.aborted = delay is not None
            sample.error = "" if sample.aborted else "timeout"
        except (aiohttp.ClientError, OSError) as error:
            sample.error = type(error).__name__
        except ValueError as error:
            sample.error = f"not an answer: {error}"[:_SHOWN]
        sample.ended = self.now
        self._on_end(sample)

    async def _read(self, response: aiohttp.ClientResponse, sample: Sample) -> None:
        if response.content_type != "text/event-stream":
            answer = json.loads(await response.read())
            if response.status != 200:
                sample.error = f"{response.status} {_error_of(answer)}"[:_SHOWN]
                return
            sample.commits.append(self.now)
            _note_usage(sample, answer)
            return
        done = False
        async for line in response.content:
            if line.startswith(_DONE):
                done = True
            elif line.startswith(_DATA):
                self._event(sample, json.loads(line[len(_DATA) :]))
        if not done and not sample.error:
            sample.error = "the stream ended early"

    def _event(self, sample: Sample, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            sample.error = f"in stream: {_error_of(chunk)}"[:_SHOWN]
        elif any(choice.get("text") or choice.get("delta", {}).get("content") for choice in chunk["choices"]):
            sample.commits.append(self.now)
        if chunk.get("usage"):
            _note_usage(sample, chunk)


def _note_usage(sample: Sample, answer: dict[str, Any]) -> None:
    usage = answer.get("usage") or {}
    sample.tokens = usage.get("completion_tokens")
    sample.forwards = (usage.get("fewstep") or {}).get("forwards")


def _error_of(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("code") or error.get("message") if isinstance(error, dict) else answer)
