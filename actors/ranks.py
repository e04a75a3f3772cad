"""The other ranks of a sharded replica: Ray actors that the replica starts, watches, and takes along when it ends.

They stand in the replica's own placement group, a bundle each, and belong to the replica: when its process ends, however it
does, Ray ends them. None is restarted: a rank without the pages of its peers is of no use, so the replica goes as a whole.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from fewstep.actors.engine.rendezvous import Rendezvous
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
        import torch

        torch.set_num_threads(num_threads)
        logging.getLogger("fewstep").setLevel(logging.INFO)

    def host(self) -> tuple[str, int]:
        """Node id and process id."""
        ray: Any = importlib.import_module("ray")
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def follow(self, place: Rendezvous, rank: int) -> None:
        """Be a rank of one model, until rank 0 or a peer is gone; then the whole process ends, and its sockets with it."""
        from fewstep.actors.engine.sharded_model import follow

        try:
            follow(place, rank)
        finally:
            threading.Timer(_LAST_WORDS_S, os._exit, (1,)).start()


class RankGroup:
    """Ranks 1 and up of a replica; made in the replica's process, which is where they meet.

    Args:
        num_ranks: rank 0, the caller's, included.
        num_models: each gets a group of its own.
        num_cpus: logical CPUs of each rank, and torch's threads, at least one.
        deadline_s: a rank that has not answered within it is lost.
    Raises:
        ActorDied: a rank did not start.
    Attributes:
        places: where the ranks of each model meet.
    """

    def __init__(self, num_ranks: int, num_models: int, num_cpus: float, deadline_s: float) -> None:
        ray: Any = importlib.import_module("ray")
        groups: Any = importlib.import_module("ray.util.placement_group")
        from fewstep.actors.engine.ranks import MeetingPoint

        self._ray = ray
        actor: Any = ray.remote(
            num_cpus=num_cpus, max_restarts=0, max_task_retries=0, max_concurrency=num_models + _BESIDE
        )(RankActor)
        own_group = groups.get_current_placement_group()
        self._actors = [
            actor.options(**_in_bundle(own_group, rank)).remote(max(1, int(num_cpus)))
            for rank in range(1, num_ranks)
        ]
        hosts = self._hosts()
        here = ray.get_runtime_context().get_node_id()
        # Nobody else on the network needs to see ranks that share a host.
        alone = all(node == here for node, _ in hosts)
        self._meeting = MeetingPoint(_LOOPBACK if alone else _address_of(ray, here))
        self.places = [
            self._meeting.rendezvous(f"model-{index}", num_ranks, deadline_s) for index in range(num_models)
        ]
        self._names = {
            actor.follow.remote(place, rank): f"rank {rank} of {num_ranks} (pid {hosts[rank - 1][1]})"
            for place in self.places
            for rank, actor in enumerate(self._actors, start=1)
        }

    def check(self) -> None:
        """Whether all ranks live.

        Raises:
            ActorDied: names one that does not, and why.
        """
        ended, _ = self._ray.wait(list(self._names), num_returns=1, timeout=0)
        for reference in ended:
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                raise ActorDied(self._names[reference], _words(error)) from error
            raise ActorDied(self._names[reference], "it left")

    def _hosts(self) -> Sequence[tuple[str, int]]:
        deadline = time.monotonic() + _START_S
        try:
            asked = [actor.host.remote() for actor in self._actors]
            found: Sequence[tuple[str, int]] = self._ray.get(asked, timeout=deadline - time.monotonic())
        except self._ray.exceptions.RayError as error:
            raise ActorDied("a rank", f"it did not start: {_words(error)}") from error
        return found


def _in_bundle(group: Any, rank: int) -> dict[str, Any]:
    if group is None:
        return {}
    strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
    return {"scheduling_strategy": strategies.PlacementGroupSchedulingStrategy(group, rank)}


def _address_of(ray: Any, node_id: str) -> str:
    """As the cluster knows it; asked for the process's own, Ray would look for a way to the internet."""
    found: str = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)
    return found


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[-400:] or type(error).__name__
