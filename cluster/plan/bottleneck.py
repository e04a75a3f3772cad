"""Where a fleet of N replicas binds first: its one controller, its object store, or the tree that weights travel down."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.cluster.plan.broadcast import Link, from_holders, simulate
from fewstep.cluster.plan.push import push_of
from fewstep.cluster.plan.settings import PlanConfig


@dataclass(frozen=True)
class Scale:
    """One fleet size.

    Attributes:
        controller_share: of its one thread's time, for heartbeats and decisions; above 1 it falls behind.
        tick_s: of the state machine, for one look at every replica.
        calls_s: to make one call a replica, as a push does.
        put_s: to write a push into the object store.
        flat_s, holders_s, tree_s: until weights are on every node, by one uplink, by holders that double, and by the tree.
        tree_depth: hops; push_s: the whole push by the tree, calls and loads included.
        binds: what takes the largest part of it, or the controller where it falls behind.
    """

    num_replicas: int
    num_nodes: int
    controller_share: float
    tick_s: float
    calls_s: float
    put_s: float
    flat_s: float
    holders_s: float
    tree_s: float
    tree_depth: int
    push_s: float
    binds: str


def scales(config: PlanConfig) -> list[Scale]:
    """Every size in `config.control.num_replicas`."""
    return [_scale(config, count) for count in config.control.num_replicas]


def _scale(config: PlanConfig, num_replicas: int) -> Scale:
    control, fleet, size = config.control, config.fleet, config.model.weight_bytes
    nodes = math.ceil(num_replicas / fleet.replicas_per_node)
    link = Link(fleet.network_bytes_per_s, control.hop_s)
    push = push_of(config, num_replicas)
    tick = num_replicas * control.decision_s
    share = (num_replicas * control.call_s + tick) / control.heartbeat_s
    parts = {
        "object store (the driver's put)": push.put_s,
        "weight tree": push.tree.seconds,
        "controller (one call a replica)": push.calls_s,
        "loading into tensors": push.load_s,
    }
    binds = max(parts, key=lambda name: parts[name])
    return Scale(
        num_replicas=num_replicas,
        num_nodes=nodes,
        controller_share=share,
        tick_s=tick,
        calls_s=push.calls_s,
        put_s=push.put_s,
        flat_s=simulate(nodes, size, link, fan_out=None, bucket_bytes=control.bucket_bytes).seconds,
        holders_s=from_holders(nodes, size, link).seconds,
        tree_s=push.tree.seconds,
        tree_depth=push.tree.depth,
        push_s=push.seconds,
        binds="controller (heartbeats)" if share > 1.0 else binds,
    )
