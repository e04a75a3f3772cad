"""Real ranks for the engine's tests: processes that follow, over gloo on the loopback address."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import torch

from fewstep.actors.engine.ranks import Ranks
from fewstep.actors.engine.rendezvous import MeetingPoint, Rendezvous
from fewstep.actors.engine.sharded_model import end, follow


@dataclass(frozen=True)
class Group:
    """Rank 0's end, and the processes of the others."""

    ranks: Ranks
    processes: list[BaseProcess]


@contextmanager
def open_ranks(num_ranks: int, deadline_s: float = 60.0) -> Iterator[Group]:
    meeting = MeetingPoint("127.0.0.1", num_ranks, deadline_s)
    with following(meeting.place) as processes:
        ranks = Ranks(meeting.place, 0, listener=meeting.detach())
        try:
            yield Group(ranks, processes)
        finally:
            end(ranks)


@contextmanager
def following(place: Rendezvous) -> Iterator[list[BaseProcess]]:
    """Ranks 1 and up; whoever is rank 0 ends them within the block, or soon after."""
    spawn = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        spawn.Process(target=_follow, args=(place, rank), daemon=True) for rank in range(1, place.num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()


def _follow(place: Rendezvous, rank: int) -> None:
    torch.set_num_threads(1)
    follow(place, rank)
