"""What a thousand replicas cost their controller, and what a push down a tree takes on this machine.

`python bench/fleet_scale.py` -> bench/results/fleet-scale.json.

decision: seconds of one tick of the fleet's state machine (`Fleet.silence`, `Fleet.names` of every state), a replica, with
up to 10,000 of them in mixed states. tree: real processes over loopback TCP, each with an uplink that is paced to the
same bytes per second, so that what is measured is the shape of the push and not this machine's memory; one uplink for all
beside the tree, and the simulator's prediction beside each.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fewstep.actors.fleet import Fleet, State
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.records import WeightVersion

RESULT = Path(__file__).resolve().parent / "results" / "fleet-scale.json"
REPEATS = 5
FLEETS = (100, 1000, 10_000)
RECEIVERS = (1, 3, 7, 15, 31)
FAN_OUT = 2
UPLINK_BYTES_PER_S = 20e6
BUCKET = 256 * 1024
NUM_BUCKETS = 16


def tick_s(num_replicas: int) -> float:
    """Median seconds of one look at every replica, none of which is silent for too long."""
    clock = [0.0]
    fleet = Fleet([f"replica-{index}" for index in range(num_replicas)], lambda: clock[0])
    version = WeightVersion("bench", 1, "0" * 64)
    fleet.expect(version)
    for index, name in enumerate(fleet.members):
        fleet.started(name)
        if index % 10:
            fleet.admitted(name, version)
    busy = [name for index, name in enumerate(fleet.members) if index % 10]
    seconds = []
    for _ in range(REPEATS * 4):
        clock[0] += 0.01
        started = time.perf_counter()
        fleet.silence(busy)
        for state in State:
            fleet.names(state)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def node(
    index: int, ports: Sequence[int], listener: socket.socket | None, children: list[int], done: Connection
) -> None:
    """Receive every bucket from the parent and pass it on to the children at the paced rate; say when the last was there."""
    outgoing = [socket.create_connection(("127.0.0.1", ports[child])) for child in children]
    incoming = None
    if listener is not None:
        incoming, _ = listener.accept()
    done.send("ready")
    bucket = bytearray(BUCKET)
    if incoming is None:
        done.recv()
    due: float | None = None
    for _ in range(NUM_BUCKETS):
        if incoming is not None:
            view = memoryview(bucket)
            while view:
                view = view[incoming.recv_into(view) :]
        for sender in outgoing:
            # The uplink is busy with a bucket for as long as it takes at the paced rate.
            due = max(time.monotonic(), due or 0.0) + BUCKET / UPLINK_BYTES_PER_S
            time.sleep(max(0.0, due - time.monotonic()))
            sender.sendall(bucket)
    done.send(time.monotonic())
    for connection in outgoing:
        connection.close()


def push_s(num_receivers: int, fan_out: int | None) -> float:
    """Seconds until the last of so many processes has every bucket; None = one uplink serves all."""
    from fewstep.cluster.plan.broadcast import tree_children

    count, width = num_receivers + 1, fan_out or num_receivers
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(count)]
    processes = [
        context.Process(
            target=node,
            args=(
                index, ports, listeners[index] if index else None,
                list(tree_children(index, count, width)), pipes[index][1],
            ),
        )
        for index in range(count)
    ]  # fmt: skip
    for process in processes:
        process.start()
    for ours, _ in pipes:
        ours.recv()
    started = time.monotonic()
    pipes[0][0].send("go")
    ends = [float(ours.recv()) for ours, _ in pipes]
    for process in processes:
        process.join()
    for listener in listeners:
        listener.close()
    return max(ends) - started


def trees() -> list[dict[str, Any]]:
    """Measured and predicted pushes."""
    from fewstep.cluster.plan.broadcast import Link, simulate

    rows = []
    link, num_bytes = Link(UPLINK_BYTES_PER_S), float(BUCKET * NUM_BUCKETS)
    for count in RECEIVERS:
        row: dict[str, Any] = {"receivers": count}
        for name, fan_out in (("tree", FAN_OUT), ("one_uplink", None)):
            predicted = simulate(count, num_bytes, link, fan_out=fan_out, bucket_bytes=BUCKET)
            row[f"{name}_s"] = statistics.median(push_s(count, fan_out) for _ in range(3))
            row[f"{name}_predicted_s"] = predicted.seconds
            row[f"{name}_hops"] = predicted.depth
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    ticks = {str(count): tick_s(count) for count in FLEETS}
    report = {
        "tick_s": ticks,
        "decision_s_per_replica": ticks[str(FLEETS[-1])] / FLEETS[-1],
        "push": trees(),
        "settings": {
            "uplink_bytes_per_s": UPLINK_BYTES_PER_S,
            "num_bytes": BUCKET * NUM_BUCKETS,
            "bucket_bytes": BUCKET,
            "fan_out": FAN_OUT,
        },
        "machine": machine_info(),
        "commit": git_commit(),
    }
    atomic_write_text(RESULT, json.dumps(report, indent=2) + "\n")
    print(f"ticks: {ticks}; wrote {RESULT}")


if __name__ == "__main__":
    main()
