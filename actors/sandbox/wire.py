"""Frames on a stream socket: four bytes of big-endian length, then one JSON value. No pickle, ever."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

_HEADER = struct.Struct(">I")


class FrameTooLarge(ValueError):
    """The peer announced a frame larger than the reader accepts."""


def send(connection: socket.socket, message: Any, deadline: float | None = None) -> None:
    """Writes one frame; `deadline` is on the monotonic clock.

    Raises:
        TimeoutError: the deadline passed before the peer had read it all.
        OSError: the peer is gone.
    """
    body = json.dumps(message, separators=(",", ":")).encode("utf-8", "surrogatepass")
    connection.settimeout(_remaining(deadline))
    connection.sendall(_HEADER.pack(len(body)) + body)


def receive(connection: socket.socket, limit: int, deadline: float | None = None) -> Any:
    """Reads one frame of at most `limit` bytes; `deadline` is on the monotonic clock and holds for all of it.

    Raises:
        TimeoutError: the deadline passed.
        EOFError: the peer closed the stream, perhaps in the middle of a frame.
        FrameTooLarge: more than `limit` bytes announced; nothing of the body is read.
        ValueError, RecursionError: the body is not JSON.
        OSError: the stream broke.
    """
    (length,) = _HEADER.unpack(_exactly(connection, _HEADER.size, deadline))
    if length > limit:
        raise FrameTooLarge(f"{length} bytes, more than the {limit} allowed")
    return json.loads(_exactly(connection, length, deadline).decode("utf-8", "surrogatepass"))


def _exactly(connection: socket.socket, count: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        # Renewed before every read: a peer that drips bytes must not stretch the deadline.
        connection.settimeout(_remaining(deadline))
        part = connection.recv(min(count - len(parts), 1 << 16))
        if not part:
            raise EOFError("the peer closed the stream")
        parts += part
    return bytes(parts)


def _remaining(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline passed")
    return left
