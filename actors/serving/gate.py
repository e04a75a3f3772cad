"""The ASGI middleware that brings every HTTP request to the desk and closes it afterwards."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep.actors.serving.desk import CURRENT, Desk
from fewstep.actors.serving.metrics import CONTENT_TYPE, page
from fewstep.actors.serving.refusals import Refused, TooLarge
from fewstep.actors.serving.visit import Visit
from fewstep.platform.errors import UserError

# nginx's code for "the client went away"; nobody is left to read it, but it shows in access logs.
CLIENT_GONE = 499


def add_desk(app: FastAPI, desk: Desk, respond: Callable[[Exception], Response]) -> None:
    """Put a desk in front of an application, and /metrics into it.

    Args:
        respond: the response to an error, in OpenAI's shape.
    """
    app.add_middleware(Gate, desk=desk, respond=respond)

    @app.get("/metrics", summary="Metrics of all replicas in Prometheus' text format")
    async def metrics() -> Response:
        return Response(page(await desk.page()), headers={"content-type": CONTENT_TYPE})


class Gate:
    """One call a request. Streams pass through: it looks at the first message of an answer only."""

    def __init__(self, app: ASGIApp, desk: Desk, respond: Callable[[Exception], Response]) -> None:
        self._app, self._desk, self._respond = app, desk, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        visit = self._desk.open(scope["method"], scope["path"], headers)
        mark = CURRENT.set((self._desk, visit))
        try:
            await self._pass(visit, headers, scope, receive, send)
        finally:
            CURRENT.reset(mark)
            visit.route = getattr(scope.get("route"), "path", "other")
            self._desk.close(visit)

    async def _pass(
        self, visit: Visit, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        limit = self._desk.limits.max_body_bytes
        started = False

        async def take() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                piece = message.get("body", b"")
                visit.num_body_bytes += len(piece)
                if visit.num_body_bytes > limit:
                    visit.refused = TooLarge.reason
                    raise _too_large(limit)
                if self._desk.keeps_bodies:
                    visit.body += piece
            return message

        async def give(message: Message) -> None:
            nonlocal started
            if not started:
                started, visit.status = True, message["status"]
                found = [value for name, value in message.get("headers", ()) if name == b"x-request-id"]
                visit.request_id = found[0].decode("latin-1") if found else ""
            await send(message)

        try:
            self._desk.check(visit, headers)
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > limit:
                raise _too_large(limit)
            await self._app(scope, take, give)
        except ClientDisconnect:  # in the middle of its own body
            visit.status = CLIENT_GONE
        except (Refused, UserError) as error:
            if started:
                raise
            visit.refused = error.reason if isinstance(error, Refused) else ""
            await self._respond(error)(scope, receive, give)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"body: got more than {limit} bytes; allowed: at most that; fix: send a shorter prompt")
