"""A key-value store of torch.distributed that listens on one address, where processes meet."""

from __future__ import annotations

import socket
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]


def listening_store(host: str) -> tuple[Any, int]:
    """The store and its port.

    Given a socket of ours, because torch's own listens on all addresses; bound from here on, because a port that is free now
    can be another's when it is wanted.
    """
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port
