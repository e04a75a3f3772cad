"""System metrics of the other nodes of a cluster: one sampler a node, asked by the driver, which alone writes them.

All Ray calls of system metrics are in this file.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from fewstep.platform.errors import ResourceError
from fewstep.platform.system_metrics import HostSampler

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0


class _Sampler:
    """A `HostSampler` behind an actor handle."""

    def __init__(self) -> None:
        self._sampler = HostSampler()

    def sample(self) -> dict[str, float]:
        return self._sampler()


class OtherNodes:
    """Samplers on every node of the open session's cluster but the driver's own, for the length of a `with` block.

    Attributes:
        hosts: host name of each node by the name its metrics have, the driver's own node first.
    """

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        own = ray.get_runtime_context().get_node_id()
        nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))  # type: ignore[no-untyped-call]
        self.hosts = {"driver": next(n["NodeManagerHostname"] for n in nodes if n["NodeID"] == own)}
        self._actors: dict[str, Any] = {}
        for node in nodes:
            if node["NodeID"] == own:
                continue
            name = f"node_{node['NodeID'][:8]}"
            self.hosts[name] = node["NodeManagerHostname"]
            # A sampler costs nothing and must not keep a replica from its place.
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": place}
            self._actors[name] = ray.remote(_Sampler).options(**options).remote()  # type: ignore[attr-defined]

    def samples(self) -> Iterator[tuple[str, Callable[[], Mapping[str, float]]]]:
        """Name and sampler of each other node; a sampler whose node is gone raises ResourceError."""
        for name, actor in self._actors.items():
            yield name, lambda name=name, actor=actor: self._ask(name, actor)  # type: ignore[misc]

    def _ask(self, name: str, actor: Any) -> Mapping[str, float]:
        try:
            answer: Mapping[str, float] = self._ray.get(actor.sample.remote(), timeout=_ANSWER_SECONDS)
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            reason = str(error).strip().splitlines()
            raise ResourceError(
                name, reason[0] if reason else type(error).__name__, "a node that answers", "look at the node"
            ) from error
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in self._actors.values():
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)
