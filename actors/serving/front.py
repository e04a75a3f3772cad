"""An HTTP server in the replica itself: without Ray Serve's proxy a request crosses one process less.

With 16 streaming clients on two cores the embedded model keeps half of its tokens a second behind
Serve's proxy and three quarters without it (`bench/serving.py http_ratio`): every chunk through the proxy is a Ray call.
Here the replicas of one machine
listen on one port together (SO_REUSEPORT), and the kernel deals connections out to those that are alive. Ray Serve still
starts, checks and replaces the replicas.
"""

from __future__ import annotations

import socket
import threading

import uvicorn
from fastapi import FastAPI

from fewstep.platform.errors import ActorDied

_BACKLOG = 2048


class Front:
    """Serves an application from a thread of its own, from construction on.

    Args:
        host, port: shared with the other replicas of this machine.
    Raises:
        OSError: the port cannot be listened on.
    """

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(address)
        # Access lines are the desk's; signals belong to the process's owner.
        config = uvicorn.Config(app, log_level="error", access_log=False, backlog=_BACKLOG)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="fewstep-front", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise ActorDied if the server has ended."""
        if not self._thread.is_alive():
            raise ActorDied("HTTP server", "its thread has ended")

    def close(self) -> None:
        """Take no more connections, finish the open requests, end."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
