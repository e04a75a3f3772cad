"""A transport by its name."""

from __future__ import annotations

from fewstep.actors.weight_sync.base import WeightTransport
from fewstep.actors.weight_sync.broadcast import BroadcastTransport
from fewstep.actors.weight_sync.object_store import ObjectStoreTransport
from fewstep.actors.weight_sync.shared_memory import SharedMemoryTransport
from fewstep.actors.weight_sync.transport_name import TransportName


def open_transport(name: TransportName, host: str = "127.0.0.1") -> WeightTransport:
    """Args:
    name: anything but `auto`, which is for whoever knows where the receivers are.
    host: the address at which receivers reach this process, where one is needed.
    """
    if name == "shared_memory":
        return SharedMemoryTransport()
    if name == "object_store":
        return ObjectStoreTransport()
    assert name == "broadcast", name
    return BroadcastTransport(host)
