"""What one push of new weights to N replicas takes, part by part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.cluster.plan.broadcast import Delivery, Link, simulate
from fewstep.cluster.plan.settings import PlanConfig


@dataclass(frozen=True)
class Push:
    """Parts of one push, one after the other.

    Attributes:
        put_s: the driver's write into the object store; calls_s: the controller's, one a replica; tree: from node to node.
        load_s: a replica takes weights that have arrived, and stands still for that alone: until then it answers on.
    """

    put_s: float
    calls_s: float
    tree: Delivery
    load_s: float

    @property
    def seconds(self) -> float:
        """The whole push."""
        return self.put_s + self.calls_s + self.tree.seconds + self.load_s


def load_s(config: PlanConfig) -> float:
    """Seconds for which a replica stands still, however many there are."""
    return config.model.weight_bytes / 1e9 * config.control.load_s_per_gb


def push_of(config: PlanConfig, num_replicas: int) -> Push:
    """A push to so many replicas by the tree."""
    control, fleet, size = config.control, config.fleet, config.model.weight_bytes
    tree = simulate(
        math.ceil(num_replicas / fleet.replicas_per_node),
        size,
        Link(fleet.network_bytes_per_s, control.hop_s),
        fan_out=control.fan_out,
        bucket_bytes=control.bucket_bytes,
    )
    return Push(
        put_s=size / control.object_put_bytes_per_s,
        calls_s=num_replicas * control.call_s,
        tree=tree,
        load_s=load_s(config),
    )
