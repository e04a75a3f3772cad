"""Which actor goes on which node: pure functions from (nodes, needs) to a placement. Knows no Ray.

Two wishes, in this order: actors of a packed role stay on one node together (trainer ranks all-reduce gradients); all
others are spread, so that a lost node costs as few of a role as can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.platform.errors import ResourceError

Layout = Literal["auto", "colocated", "split"]

_ROUNDING = 1e-9  # fractions such as 0.4 add up inexactly


@dataclass(frozen=True)
class Node:
    """A host with the logical CPUs it has free. `node_id` is Ray's, `address` is for people."""

    node_id: str
    address: str
    cpus: float


@dataclass(frozen=True)
class Need:
    """Actors of one role.

    Attributes:
        count: how many; cpus: of each.
        packed: all of them on one node.
    """

    role: str
    count: int
    cpus: float
    packed: bool = False


@dataclass(frozen=True)
class Bundle:
    """One actor's place, and its CPUs."""

    role: str
    index: int
    node: Node
    cpus: float


@dataclass(frozen=True)
class Placement:
    """Every actor's place, roles in the order of the needs."""

    bundles: tuple[Bundle, ...]

    def node_ids(self, role: str) -> list[str]:
        """Of a role's actors, in their order."""
        return [bundle.node.node_id for bundle in self.bundles if bundle.role == role]

    def as_data(self) -> list[dict[str, Any]]:
        """For a file."""
        return [
            {"role": b.role, "index": b.index, "node": b.node.address, "cpus": b.cpus} for b in self.bundles
        ]

    def text(self) -> str:
        """A line a node: what it gets."""
        lines = []
        for node in dict.fromkeys(bundle.node for bundle in self.bundles):
            here = [bundle for bundle in self.bundles if bundle.node == node]
            roles = dict.fromkeys(bundle.role for bundle in here)
            what = ", ".join(f"{sum(b.role == role for b in here)} {role}" for role in roles)
            cpus = sum(b.cpus for b in here)
            lines.append(f"{node.address}: {what} ({cpus:g} of {node.cpus:g} free CPUs)")
        return "\n".join(lines)


def place(nodes: Sequence[Node], needs: Sequence[Need], layout: Layout = "auto") -> Placement:
    """A place for every actor.

    Args:
        needs: packed roles are placed first, whatever their order.
        layout: split = no other actor shares a node with a packed role; colocated = everything on one node; auto = spread
            roles share the packed role's node only where that is what is left.
    Raises:
        ResourceError: says what is asked for, and what is free on each node.
    """
    packed = [need for need in needs if need.packed]
    spread = [need for need in needs if not need.packed]
    if layout == "colocated":
        for node in nodes:
            found = _try([node], needs)
            if found is not None:
                return _ordered(found, needs)
        raise _refusal(nodes, needs, layout)
    for hosts in _packed_hosts(nodes, packed):
        taken = [
            _bundle(need, index, host)
            for need, host in zip(packed, hosts, strict=True)
            for index in range(need.count)
        ]
        others = [node for node in nodes if node not in hosts]
        found = _try(others, spread)
        if found is None and (layout == "auto" or not spread):
            found = _try([*others, *dict.fromkeys(hosts)], spread, taken)
        if found is not None:
            return _ordered([*taken, *found], needs)
    raise _refusal(nodes, needs, layout)


def _packed_hosts(nodes: Sequence[Node], packed: Sequence[Need]) -> list[list[Node]]:
    """Every way to give each packed role a node that holds all of it, the tightest fits first."""
    ways: list[list[Node]] = [[]]
    for need in packed:
        ways = [
            [*way, node]
            for way in ways
            for node in sorted(nodes, key=lambda node: node.cpus)
            if _fits(
                node,
                need,
                [_bundle(n, i, h) for n, h in zip(packed, way, strict=False) for i in range(n.count)],
                need.count,
            )
        ]
    return ways


def _try(nodes: Sequence[Node], needs: Sequence[Need], taken: Sequence[Bundle] = ()) -> list[Bundle] | None:
    """Large actors first, each on the node that has fewest of its role and, among those, most room for more."""
    found: list[Bundle] = []
    for need in sorted(needs, key=lambda need: -need.cpus):
        for index in range(need.count):
            fitting = [node for node in nodes if _fits(node, need, [*taken, *found])]
            if not fitting:
                return None
            best = min(
                fitting,
                key=lambda node: (_of_role(found, node, need.role), -_room(node, need, [*taken, *found])),
            )
            found.append(_bundle(need, index, best))
    return found


def _bundle(need: Need, index: int, node: Node) -> Bundle:
    return Bundle(need.role, index, node, need.cpus)


def _fits(node: Node, need: Need, taken: Sequence[Bundle], count: int = 1) -> bool:
    return _room(node, need, taken) + _ROUNDING >= count


def _room(node: Node, need: Need, taken: Sequence[Bundle]) -> float:
    """How many actors of a need the node still holds, in parts."""
    cpus = node.cpus - sum(bundle.cpus for bundle in taken if bundle.node == node)
    return cpus / need.cpus


def _of_role(bundles: Sequence[Bundle], node: Node, role: str) -> int:
    return sum(bundle.role == role and bundle.node == node for bundle in bundles)


def _ordered(bundles: Sequence[Bundle], needs: Sequence[Need]) -> Placement:
    order = {need.role: index for index, need in enumerate(needs)}
    return Placement(tuple(sorted(bundles, key=lambda bundle: (order[bundle.role], bundle.index))))


def _refusal(nodes: Sequence[Node], needs: Sequence[Need], layout: Layout) -> ResourceError:
    asked = "; ".join(
        f"{need.count} {need.role} of {need.cpus:g} CPU" + (" on one node" if need.packed else "")
        for need in needs
    )
    free = ", ".join(f"{node.address} {node.cpus:g} CPU" for node in nodes) or "nothing"
    return ResourceError(
        f"placement ({layout})",
        asked,
        f"what is free: {free}",
        "ask for less, add nodes, or choose another layout",
    )
