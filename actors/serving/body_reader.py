"""The bytes of a request body, no more of them than any prompt needs."""

from __future__ import annotations

from fastapi import Request

from fewstep.actors.serving.http_errors import BodyTooLarge

MAX_BODY_BYTES = 4 * 2**20


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it is longer than MAX_BODY_BYTES; the rest is not read.
    """
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge("body", f"more than {MAX_BODY_BYTES} bytes", "less", "send a shorter prompt")
        pieces.append(piece)
    return b"".join(pieces)
