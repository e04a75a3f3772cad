"""How weights reach N replicas: one source sends to each in turn, or a tree passes them on.

Every node has one uplink and sends over it one bucket at a time. In a tree with fan-out k a node begins to pass a bucket
on as soon as it has it, so B buckets take about (depth + B) * k bucket times: the depth, log_k N, is paid once, and the
source's uplink carries k copies instead of N.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from fewstep.platform.rng import generator


@dataclass(frozen=True)
class Link:
    """A node's uplink: bytes per second, and the latency of one bucket's call."""

    bytes_per_s: float
    hop_s: float = 0.0


@dataclass(frozen=True)
class Delivery:
    """One simulated push.

    Attributes:
        seconds: until the last living node has everything; depth: hops of the farthest.
        source_bytes: that the source's uplink carried; adopted: nodes whose parent died and who were served again.
    """

    seconds: float
    depth: int
    source_bytes: float
    adopted: int = 0


def tree_children(index: int, num_nodes: int, fan_out: int) -> range:
    """Children of a node of the complete k-ary tree over nodes 0 (the source) to num_nodes - 1."""
    return range(min(index * fan_out + 1, num_nodes), min(index * fan_out + fan_out + 1, num_nodes))


def tree_parent(index: int, fan_out: int) -> int:
    """The parent of a node other than the source."""
    return (index - 1) // fan_out


def tree_depth(num_nodes: int, fan_out: int) -> int:
    """Hops from the source to the last node."""
    depth, index = 0, num_nodes - 1
    while index > 0:
        index, depth = tree_parent(index, fan_out), depth + 1
    return depth


def simulate(
    num_receivers: int,
    num_bytes: float,
    link: Link,
    *,
    fan_out: int | None = 2,
    bucket_bytes: float = 64e6,
    dead_share: float = 0.0,
    detect_s: float = 1.0,
    seed: int = 0,
) -> Delivery:
    """A push to so many nodes, bucket by bucket.

    Args:
        fan_out: children of a node; None = the source serves everybody itself.
        dead_share: nodes that are gone when the push begins; whose parent is one of them is adopted, after `detect_s`, by
            the nearest living node above it.
    """
    num_nodes = num_receivers + 1
    width = fan_out if fan_out is not None else max(1, num_receivers)
    dead = generator(seed, "dead").random(num_nodes) < dead_share
    dead[0] = False
    children, late, adopted = _adopt(num_nodes, width, dead)
    sizes = _bucket_sizes(num_bytes, bucket_bytes)
    have = np.zeros((num_nodes, len(sizes)))  # when a node has a bucket; the source has all of them at 0
    depth = np.zeros(num_nodes, int)
    for node in range(num_nodes):  # a parent's index is below its children's
        if dead[node] or not children[node]:
            continue
        uplink_free = 0.0
        # All children get a bucket before the next one: the tree fills as a pipeline.
        for bucket, size in enumerate(sizes):
            for child in children[node]:
                ready = max(uplink_free, have[node, bucket], detect_s if child in late else 0.0)
                uplink_free = ready + size / link.bytes_per_s
                have[child, bucket] = uplink_free + link.hop_s
        for child in children[node]:
            depth[child] = depth[node] + 1
    living = ~dead
    return Delivery(
        seconds=float(have[living, -1].max()),
        depth=int(depth[living].max()),
        source_bytes=num_bytes * len(children[0]),
        adopted=adopted,
    )


def _adopt(
    num_nodes: int, width: int, dead: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> tuple[list[list[int]], set[int], int]:
    children: list[list[int]] = [[] for _ in range(num_nodes)]
    late: set[int] = set()
    for node in range(1, num_nodes):
        if dead[node]:
            continue
        parent = tree_parent(node, width)
        if dead[parent]:
            late.add(node)
        while dead[parent]:
            parent = tree_parent(parent, width)
        children[parent].append(node)
    return children, late, len(late)


def _bucket_sizes(num_bytes: float, bucket_bytes: float) -> list[float]:
    whole = int(num_bytes // bucket_bytes)
    rest = num_bytes - whole * bucket_bytes
    return [bucket_bytes] * whole + ([rest] if rest > 0 or not whole else [])


def from_holders(num_receivers: int, num_bytes: float, link: Link) -> Delivery:
    """A push in which every node that has all of it serves one that has none, round after round (doubling).

    What an object store does whose nodes fetch a whole object from a random holder; log2 N rounds, nothing pipelined.
    """
    once = num_bytes / link.bytes_per_s + link.hop_s
    free = [0.0]  # when each holder's uplink is free
    for _ in range(num_receivers):
        at = heapq.heappop(free) + once
        heapq.heappush(free, at)
        heapq.heappush(free, at)
    last = max(free) if num_receivers else 0.0
    rounds = max(0, int(np.ceil(np.log2(num_receivers + 1))))
    return Delivery(seconds=last, depth=rounds, source_bytes=num_bytes * rounds)
