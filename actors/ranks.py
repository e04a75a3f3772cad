"""The other ranks of a sharded replica: Ray actors that the replica starts, watches, and takes along when it ends.

They stand in the replica's own placement group, a bundle each, and belong to the replica: when its process ends, however it
does, Ray ends them. None is restarted: a rank without the pages of its peers is of no use, so the replica goes as a whole.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from fewstep.actors.deaths import cause_of_death, failures
from fewstep.actors.engine.rendezvous import MeetingPoint, Rendezvous
from fewstep.platform.errors import ActorDied

logger = logging.getLogger(__name__)

_START_S = 180.0
_LOOPBACK = "127.0.0.1"
# Beside one loop for each model: the question where it is.
_BESIDE = 1
# Its answer to a loop that has ended must have left before the process does.
_LAST_WORDS_S = 0.5


class RankActor:
    """One process with a rank's part of every model of the replica."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        logging.getLogger("fewstep").setLevel(logging.INFO)

    def node(self) -> str:
        """Ray's id of the node it is on."""
        ray: Any = importlib.import_module("ray")
        found: str = ray.get_runtime_context().get_node_id()
        return found

    def follow(self, place: Rendezvous, rank: int) -> None:
        """Be a rank of one model, until rank 0 or a peer is gone; then the whole process ends, and its sockets with it."""
        # Here and not at the start, for which the replica may be waiting.
        import torch

        from fewstep.actors.engine.sharded_model import follow

        torch.set_num_threads(self._num_threads)
        try:
            follow(place, rank)
        finally:
            threading.Timer(_LAST_WORDS_S, os._exit, (1,)).start()


class RankGroup:
    """Ranks 1 and up of a replica; made in the replica's process, whose engines are rank 0 of a model each. Without torch.

    Args:
        num_ranks: rank 0 included.
        num_models: each gets a group of its own.
        num_cpus: logical CPUs of each rank, and torch's threads, at least one.
        one_node: they are all on the replica's; nobody else on the network needs to see them then.
        deadline_s: a rank that has not answered within it is lost.
    Raises:
        ActorDied: a rank did not start.
    """

    def __init__(
        self, num_ranks: int, num_models: int, num_cpus: float, *, one_node: bool, deadline_s: float
    ) -> None:
        ray: Any = importlib.import_module("ray")
        groups: Any = importlib.import_module("ray.util.placement_group")
        self._ray, self._num_ranks, self._deadline_s = ray, num_ranks, deadline_s
        actor: Any = ray.remote(
            num_cpus=num_cpus, max_restarts=0, max_task_retries=0, max_concurrency=num_models + _BESIDE
        )(RankActor)
        own_group = groups.get_current_placement_group()
        self._actors = [
            actor.options(**_in_bundle(own_group, rank)).remote(max(1, int(num_cpus)))
            for rank in range(1, num_ranks)
        ]
        self._address = _LOOPBACK if one_node else self._address_for_all()
        self._names: dict[Any, str] = {}

    @contextmanager
    def meeting(self) -> Iterator[MeetingPoint]:
        """Send the ranks to where rank 0 of one more model will find them; it is to be started within the block.

        One model after the other, because ranks wait at a meeting for a bounded time. They start meanwhile, too.
        """
        with closing(MeetingPoint(self._address, self._num_ranks, self._deadline_s)) as meeting:
            for rank, actor in enumerate(self._actors, start=1):
                self._names[actor.follow.remote(meeting.place, rank)] = f"rank {rank} of {self._num_ranks}"
            yield meeting

    def check(self) -> None:
        """Whether all ranks live.

        Raises:
            ActorDied: names one that does not, and why.
        """
        references = list(self._names)
        ended, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        for name, cause in failures({self._names[reference]: reference for reference in ended}):
            raise ActorDied(name, cause_of_death(cause)) from cause
        for reference in ended:
            raise ActorDied(self._names[reference], "it left")

    def _address_for_all(self) -> str:
        here = self._ray.get_runtime_context().get_node_id()
        try:
            nodes = self._ray.get([actor.node.remote() for actor in self._actors], timeout=_START_S)
        except self._ray.exceptions.RayError as error:
            raise ActorDied("a rank", f"it did not start: {cause_of_death(error)}") from error
        return _LOOPBACK if set(nodes) == {here} else _address_of(self._ray, here)


def _in_bundle(group: Any, rank: int) -> dict[str, Any]:
    if group is None:
        return {}
    strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
    return {"scheduling_strategy": strategies.PlacementGroupSchedulingStrategy(group, rank)}


def _address_of(ray: Any, node_id: str) -> str:
    """As the cluster knows it; asked for the process's own, Ray would look for a way to the internet."""
    found: str = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)
    return found
