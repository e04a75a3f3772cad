"""Where the processes of one sharded model meet; free of torch, so that it can be handed on by whoever starts them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one model meet.

    Attributes:
        address, port: of the store that introduces them; a loopback address where all are on one host.
        name: tells models apart that share a store.
        deadline_s: a rank that has not answered within it is lost.
    """

    address: str
    port: int
    num_ranks: int
    name: str
    deadline_s: float
