"""The endpoints that generate: completions, chat, FIM, apply and edit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from fewstep.actors.serving.catalogue import Catalogue
from fewstep.actors.serving.gate import CLIENT_GONE
from fewstep.actors.serving.http_errors import error_body
from fewstep.actors.serving.schema import (
    ApplyBody,
    ChatBody,
    CompletionBody,
    EditBody,
    FimBody,
    parse_body,
)
from fewstep.actors.serving.stream import event_of
from fewstep.platform.errors import ActorDied, FewstepError

logger = logging.getLogger(__name__)

BODIES: dict[str, type[CompletionBody | ChatBody]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/fim/completions": FimBody,
    "/v1/apply/completions": ApplyBody,
    "/v1/edit/completions": EditBody,
}

T = TypeVar("T")


def generation_router(catalogue: Catalogue) -> APIRouter:
    """The routes of `BODIES`."""
    router = APIRouter()
    for path, cls in BODIES.items():
        router.add_api_route(path, _endpoint(catalogue, cls), methods=["POST"])
    return router


def _endpoint(catalogue: Catalogue, cls: type[CompletionBody | ChatBody]) -> Any:
    async def generate(request: Request) -> Response:
        return await _answer(catalogue, request, cls)

    return generate


async def _answer(catalogue: Catalogue, request: Request, cls: type[CompletionBody | ChatBody]) -> Response:
    body = parse_body(cls, await request.body())
    service = catalogue[body.model]
    call = service.plan(body)
    if not service.host.healthy:
        raise ActorDied("engine", "it is restarting; try again")
    updates = service.start(call)
    headers = {"x-request-id": call.envelope.id, "cache-control": "no-store"}
    if body.stream:
        events = _with_errors(service.events(call, updates))
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    text = await _unless_gone(request, service.whole(call, updates))
    if text is None:
        return Response(status_code=CLIENT_GONE)
    return Response(text, media_type="application/json", headers=headers)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None with `work` cancelled once the client has gone away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _with_errors(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events, and as the last one the error, if there is one: the status line has been sent long ago."""
    try:
        async with aclosing(events):
            async for item in events:
                yield item
    except Exception as error:
        if not isinstance(error, FewstepError):
            logger.exception("a stream failed")
        yield event_of(error_body(error)[1])
