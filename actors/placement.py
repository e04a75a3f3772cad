"""Whether and where the cluster has room: asked before actors start, because Ray would let them wait without a word."""

from __future__ import annotations

import importlib
import time
from typing import Any

from fewstep.actors.bundles import Node
from fewstep.platform.errors import ResourceError

_PATIENCE_S = 30.0
_POLL_S = 0.2
_ROUNDING = 1e-9  # fractions such as 0.4 add up inexactly


def require_room(what: str, count: int, num_cpus: float) -> None:
    """Refuse at once what the cluster never has; wait a little for what ended actors still hold.

    Args:
        what: the actors' name in the message, such as `replicas`.
        count: how many; num_cpus: logical CPUs of each.
    Raises:
        ResourceError: says how many CPUs are free.
    """
    ray: Any = importlib.import_module("ray")  # late: only a job that has a session imports it
    asked = count * num_cpus
    patience_s = _PATIENCE_S if asked <= ray.cluster_resources().get("CPU", 0.0) + _ROUNDING else 0.0
    deadline = time.monotonic() + patience_s
    while asked > (free := float(ray.available_resources().get("CPU", 0.0))) + _ROUNDING:
        if time.monotonic() >= deadline:
            raise ResourceError(
                what,
                f"{count} x {num_cpus:g} CPU",
                f"at most {free:g} CPU (free on the cluster)",
                f"ask for fewer {what} or give the session more CPUs",
            )
        time.sleep(_POLL_S)


def free_nodes() -> list[Node]:
    """The living nodes of the open session with what each has free, this one first."""
    ray: Any = importlib.import_module("ray")
    state: Any = importlib.import_module("ray._private.state")
    here = ray.get_runtime_context().get_node_id()
    free = state.available_resources_per_node()
    nodes = [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            float(free.get(node["NodeID"], {}).get("CPU", 0.0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.node_id != here, node.address))


def on_node(node_id: str | None, *, soft: bool = True) -> dict[str, Any]:
    """Options that start an actor on a node, or (if soft) elsewhere once that node is gone; none for None."""
    if node_id is None:
        return {}
    strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
    return {"scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(node_id, soft=soft)}
