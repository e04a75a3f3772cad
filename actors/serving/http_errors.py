"""Errors as OpenAI's clients know them: a status code and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fewstep.actors.serving.body_errors import UnknownField, UnsupportedField
from fewstep.actors.serving.refusals import Refused
from fewstep.actors.serving.service import ModelNotFound
from fewstep.platform.errors import ActorDied, FewstepError, UserError

logger = logging.getLogger(__name__)


_STATUS: dict[type[UserError], int] = {ModelNotFound: 404}
_CODES: dict[type[UserError], str] = {
    ModelNotFound: "model_not_found",
    UnknownField: "unknown_parameter",
    UnsupportedField: "unsupported_parameter",
}


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
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


def error_response(error: Exception) -> Response:
    """The answer to a request that an error ended."""
    status, body = error_body(error)
    headers = error.headers if isinstance(error, HTTPException | Refused) else None
    return JSONResponse(body, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of the application in this shape."""

    async def on_error(_request: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in (FewstepError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)
