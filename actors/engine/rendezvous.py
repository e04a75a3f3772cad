"""Where the processes of one sharded model meet; free of torch, so that it can be handed on by whoever starts them."""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one model meet.

    Attributes:
        address, port: of the store that introduces them; a loopback address where all are on one host.
        deadline_s: a rank that has not answered within it is lost.
    """

    address: str
    port: int
    num_ranks: int
    deadline_s: float


class MeetingPoint:
    """A rendezvous whose port is known, and connected to, before rank 0 is there to answer on it.

    Args:
        address: to listen on, and on no other.
    """

    def __init__(self, address: str, num_ranks: int, deadline_s: float) -> None:
        self._listener = socket.create_server((address, 0))
        self.place = Rendezvous(address, int(self._listener.getsockname()[1]), num_ranks, deadline_s)

    def fileno(self) -> int:
        """The descriptor, for a child that is to be rank 0."""
        return self._listener.fileno()

    def detach(self) -> int:
        """The descriptor, to be closed by whoever takes it."""
        return self._listener.detach()

    def close(self) -> None:
        """Whoever has come, or comes, is turned away, unless rank 0 has the descriptor, too."""
        self._listener.close()
