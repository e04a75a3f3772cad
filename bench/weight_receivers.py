"""How the seconds of a push grow with its receivers, for every transport; a part of `python bench/weight_sync.py`.

Receivers are Ray actors, as replicas are: each copies what it reads into tensors of its own and echoes their checksum. For
each number of receivers the transports take turns, with a memcpy of the same bytes in the sender between them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, get_args

import numpy as np
import torch

from fewstep.actors.weight_sync.base import Echo, Payload, Receiver, WeightTransport
from fewstep.actors.weight_sync.transport_name import TransportName
from fewstep.actors.weight_sync.transports import open_transport
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import state_checksum
from fewstep.platform.artifacts import git_commit, machine_info
from fewstep.platform.records import WeightVersion

State = Mapping[str, torch.Tensor]
TRANSPORTS: tuple[TransportName, ...] = tuple(name for name in get_args(TransportName) if name != "auto")
DEADLINE_S = 120.0


class Holder:
    """A receiver: tensors like those that are pushed, in a process of its own."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        torch.set_num_threads(1)
        self._own = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}

    def load_weights(self, payload: Payload, version: WeightVersion) -> Echo:
        with payload.open() as state:
            for name, tensor in self._own.items():
                tensor.copy_(state[name])
        return Echo(version, state_checksum(self._own))


def measure(states: Sequence[State], counts: Sequence[int], pushes: int) -> dict[str, Any]:
    """Rows of transport, number of receivers, median seconds and their ratio to a memcpy of the same bytes; and where.

    Args:
        states: two of equal layout, pushed in turns, so that no push finds its bytes already there.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in states[0].values())
    rows, load = [], os.getloadavg()[0]
    with ray_session(num_cpus=max(counts), object_store_bytes=4 * size + 2**28):
        import ray

        actor: Any = ray.remote(num_cpus=1)(Holder)
        shapes = {name: tuple(tensor.shape) for name, tensor in states[0].items()}
        holders = [actor.remote(shapes) for _ in range(max(counts))]
        transports = {name: open_transport(name) for name in TRANSPORTS}
        for count in counts:
            receivers = {f"receiver-{index}": receiver(holders[index]) for index in range(count)}
            rows += _compare(transports, states, receivers, pushes)
        for transport in transports.values():
            transport.close()
    return {
        "unit": "seconds per proved push",
        "bytes": size,
        "settings": {"pushes": pushes, "load_average_before": load, "threads": 1},
        "rows": rows,
        "machine": machine_info(),
        "commit": git_commit(),
    }


def receiver(holder: Any) -> Receiver:
    """The call of one actor."""

    def receive(payload: Payload, version: WeightVersion) -> Future[Echo]:
        future: Future[Echo] = holder.load_weights.remote(payload, version).future()
        return future

    return receive


def _compare(
    transports: Mapping[str, WeightTransport],
    states: Sequence[State],
    receivers: Mapping[str, Receiver],
    pushes: int,
) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in transports}
    copies: list[float] = []
    versions = [WeightVersion("bench", step, state_checksum(state)) for step, state in enumerate(states)]
    for turn in range(pushes + 1):  # the first connects and allocates, and does not count
        for name, transport in transports.items():
            which = turn % len(states)
            receipt = transport.send(states[which], versions[which], receivers, deadline_s=DEADLINE_S)
            if receipt.failures or receipt.num_calls != len(receivers):
                raise RuntimeError(f"{name}: {receipt.num_calls} calls, failures {receipt.failures}")
            seconds[name].append(receipt.seconds)
        copies.append(_copy_s(states[turn % len(states)]))
    copy_s = statistics.median(copies[1:])
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        rows.append(
            {"transport": name, "num_receivers": len(receivers), "seconds": median, "memcpy_seconds": copy_s,
             "ratio_to_memcpy": median / copy_s, "pushes": times[1:]}
        )  # fmt: skip
        print(f"{len(receivers)} receivers, {name}: {median:.3f} s, memcpy {copy_s:.3f} s", flush=True)
    return rows


def _copy_s(state: State) -> float:
    source = np.concatenate([tensor.view(torch.uint8).numpy() for tensor in state.values()])
    target = np.zeros_like(source)
    started = time.perf_counter()
    target[:] = source
    return time.perf_counter() - started


def table(result: Mapping[str, Any]) -> str:
    """For docs/refine.md: a line a number of receivers."""
    rows, machine = result["rows"], result["machine"]
    names = list(dict.fromkeys(row["transport"] for row in rows))
    found = {(row["num_receivers"], row["transport"]): row for row in rows}
    lines = [
        f"| receivers | {' | '.join(f'`{name}`, s' for name in names)} | memcpy, s |",
        f"|---:|{'---:|' * (len(names) + 1)}",
    ]
    for count in dict.fromkeys(row["num_receivers"] for row in rows):
        times = [f"{found[count, name]['seconds']:.3f}" for name in names]
        lines.append(f"| {count} | {' | '.join(times)} | {found[count, names[0]]['memcpy_seconds']:.3f} |")
    load = result["settings"]["load_average_before"]
    where = f"{machine['cpu']}, {machine['cores']} cores, load average {load:.1f} before it"
    lines += ["", f"{where}; commit `{result['commit'][:12]}`."]
    return "\n".join(lines)
