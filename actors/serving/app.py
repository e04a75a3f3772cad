"""The HTTP surface: routes, status codes and error bodies of OpenAI's API over one CompletionService."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from fewstep.actors.serving.desk import Desk
from fewstep.actors.serving.gate import add_desk
from fewstep.actors.serving.refusals import Refused
from fewstep.actors.serving.schema import (
    BodyT,
    ChatBody,
    CompletionBody,
    UnknownField,
    UnsupportedField,
    parse_body,
)
from fewstep.actors.serving.service import CompletionService, ModelNotFound
from fewstep.actors.serving.stream import event_of
from fewstep.platform.errors import ActorDied, FewstepError, RequestError, UserError

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 2**20
# nginx's code for "the client went away"; nobody is left to read it, but it shows in access logs.
_CLIENT_GONE = 499

T = TypeVar("T")


class BodyTooLarge(RequestError):
    """More bytes than any prompt needs."""


_STATUS: dict[type[UserError], int] = {ModelNotFound: 404, BodyTooLarge: 413}
_CODES: dict[type[UserError], str] = {
    ModelNotFound: "model_not_found",
    UnknownField: "unknown_parameter",
    UnsupportedField: "unsupported_parameter",
}


def create_app(service: CompletionService, desk: Desk | None = None) -> FastAPI:
    """The ASGI application; `service` is shared by all requests, and `desk`, if any, stands in front of it."""
    # The bodies are OpenAI's, documented there; pages that describe them would load scripts from elsewhere.
    app = FastAPI(title="fewstep", openapi_url=None)
    _add_error_handlers(app)
    if desk is not None:
        add_desk(app, desk, _error_response)

    @app.get("/health")
    async def health() -> Response:
        healthy = service.host.healthy
        who = {"status": "ok" if healthy else "dead", "model": service.model.name, "pid": os.getpid()}
        return JSONResponse({**who, **service.host.stats()}, 200 if healthy else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_entry(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(_entry(service))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionBody)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, ChatBody)

    return app


async def _answer(service: CompletionService, request: Request, cls: type[BodyT]) -> Response:
    body = parse_body(cls, await _read(request))
    assert isinstance(body, CompletionBody | ChatBody)
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
        return Response(status_code=_CLIENT_GONE)
    return Response(text, media_type="application/json", headers=headers)


async def _read(request: Request) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge("body", f"more than {MAX_BODY_BYTES} bytes", "less", "send a shorter prompt")
        pieces.append(piece)
    return b"".join(pieces)


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
        yield event_of(_error_body(error)[1])


def _entry(service: CompletionService) -> dict[str, Any]:
    return service.entry().model_dump(exclude_unset=True)


def _add_error_handlers(app: FastAPI) -> None:
    async def on_error(_request: Request, error: Exception) -> Response:
        return _error_response(error)

    for kind in (FewstepError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)


def _error_response(error: Exception) -> Response:
    status, body = _error_body(error)
    return JSONResponse(body, status, dict(error.headers) if isinstance(error, Refused) else None)


def _error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and OpenAI's error object. What is not meant for users is not shown to them."""
    if isinstance(error, Refused):
        return error.status, error.body()
    message, kind, param, code = str(error), "invalid_request_error", None, None
    if isinstance(error, UserError):
        param = error.field
        code = _CODES.get(type(error), "invalid_value")
        status = _STATUS.get(type(error), 400)
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, ActorDied):
        status, kind = 503, "server_error"
    else:
        status, kind = 500, "server_error"
        message = message if isinstance(error, FewstepError) else "internal error; the server's log has it"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}
