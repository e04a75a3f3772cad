"""How long a push of weights takes: `python bench/weight_sync.py [--gigabytes 1]`, about three minutes, 5 GB of memory.

A sender pushes 1 GB of tensors through shared memory to a replica's process, which copies them into tensors of its own
and echoes their checksum, as `actors/replica.py` does. Each push is measured in turns with a memcpy of the same bytes
within the sender. Then every transport pushes `--megabytes` to 1, 2, 4 and 8 receivers (bench/weight_receivers.py). Writes
bench/results/weight-sync.json: seconds and bytes of a push, its parts, and the ratio; and the table of docs/refine.md. Run it
on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])
from bench import weight_receivers
from bench.documents import fill

from fewstep.actors.weight_sync.base import Echo, Payload
from fewstep.actors.weight_sync.layout import BUCKET_BYTES, buckets, packed_bytes
from fewstep.actors.weight_sync.shared_memory import SharedMemoryTransport
from fewstep.kernels.model.checkpoint import state_checksum
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.records import WeightVersion

RESULTS = Path(__file__).resolve().parent / "results" / "weight-sync.json"
GOAL_S = 1.0
PAGE = Path(__file__).resolve().parents[1] / "docs" / "refine.md"
COUNTS = (1, 2, 4, 8)
NUM_TENSORS = 290  # of a 0.5 B model: 24 layers of 12, embedding, head


def make_state(num_bytes: int, seed: int) -> dict[str, torch.Tensor]:
    """Tensors of equal size, bfloat16."""
    draws = torch.Generator().manual_seed(seed)
    size = num_bytes // NUM_TENSORS // 2
    return {
        f"layers.{index}": torch.randint(-30_000, 30_000, (size,), generator=draws, dtype=torch.int16).view(
            torch.bfloat16
        )
        for index in range(NUM_TENSORS)
    }


def replica(pipe: Connection, num_bytes: int) -> None:
    """The receiving process: loads what it is sent, in place, and says what it holds and what each part took."""
    torch.set_num_threads(1)
    own = make_state(num_bytes, 1)
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        payload, version = job
        started = time.perf_counter()
        with payload.open() as state:
            for name, tensor in own.items():
                tensor.copy_(state[name])
        loaded = time.perf_counter()
        checksum = state_checksum(own)
        pipe.send((Echo(version, checksum), loaded - started, time.perf_counter() - loaded))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--pushes", type=int, default=5, help="that count, after one that does not")
    parser.add_argument("--megabytes", type=float, default=100.0, help="of a push to several receivers")
    parser.add_argument("--receivers", type=int, nargs="+", default=COUNTS, help="numbers of them")
    parser.add_argument(
        "--part",
        choices=("push", "receivers", "both"),
        default="both",
        help="the file keeps the other's result",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    if arguments.part != "receivers":
        result |= measure(int(arguments.gigabytes * 10**9), arguments.pushes)
    if arguments.part != "push":
        states = [make_state(int(arguments.megabytes * 10**6), seed) for seed in range(2)]
        result["receivers"] = weight_receivers.measure(states, arguments.receivers, arguments.pushes)
    atomic_write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    if arguments.out == RESULTS and "receivers" in result:
        fill(PAGE, "weight-sync", weight_receivers.table(result["receivers"]))
    print(json.dumps({key: result.get(key) for key in ("value", "unit", "goal", "memcpy_seconds")}, indent=2))
    return 0


def measure(num_bytes: int, pushes: int) -> dict[str, object]:
    """Pushes and copies in turns."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=replica, args=(there, num_bytes), daemon=True)
    process.start()
    assert here.recv() == "ready"
    transport, rows, copies = SharedMemoryTransport(), [], []
    target = np.empty(num_bytes, np.uint8)
    with ThreadPoolExecutor(1) as threads:
        for number in range(pushes + 1):
            state = make_state(num_bytes, number)
            row = push(transport, state, number, here, threads)
            source = np.concatenate([tensor.view(torch.uint8).numpy() for tensor in state.values()])
            started = time.perf_counter()
            target[: len(source)] = source
            copy_s = time.perf_counter() - started
            print(f"push {row['seconds']:.2f} s, memcpy {copy_s:.2f} s", flush=True)
            if number:
                rows.append(row)
                copies.append(copy_s)
    here.send(None)
    process.join()
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    memcpy_s = statistics.median(copies)
    return {
        "value": medians["seconds"],
        "unit": "seconds per push",
        "goal": f"below {GOAL_S} s",
        "goal_met": medians["seconds"] < GOAL_S,
        "bytes": packed_bytes(state),
        "parts_seconds": medians,
        "memcpy_seconds": memcpy_s,
        "ratio_to_memcpy": statistics.median(
            row["seconds"] / copied for row, copied in zip(rows, copies, strict=True)
        ),
        "ratio_to_memcpy_without_checksums": statistics.median(
            (row["publish"] + row["load"]) / copied for row, copied in zip(rows, copies, strict=True)
        ),
        "num_tensors": NUM_TENSORS,
        "num_buckets": len(buckets(state)),
        "bucket_bytes": BUCKET_BYTES,
        "calls_per_push": 1,
        "settings": {"pushes": pushes, "threads": os.environ.get("OMP_NUM_THREADS", ""), "replicas": 1},
        "machine": machine_info(),
        "commit": git_commit(),
    }


def push(
    transport: SharedMemoryTransport, state: dict[str, torch.Tensor], number: int, pipe: Connection,
    threads: ThreadPoolExecutor,
) -> dict[str, float]:  # fmt: skip
    """One push, from the state in the sender's memory to the checked echo; seconds of all of it and of its parts."""
    parts: dict[str, float] = {}
    started = time.perf_counter()
    version = WeightVersion("bench", number, state_checksum(state))
    parts["sender_checksum"] = time.perf_counter() - started
    sent = time.perf_counter()

    def receive(payload: Payload, version: WeightVersion) -> Future[Echo]:
        parts["publish"] = time.perf_counter() - sent

        def call() -> Echo:
            pipe.send((payload, version))
            echo, parts["load"], parts["replica_checksum"] = pipe.recv()
            return echo

        return threads.submit(call)

    receipt = transport.send(state, version, {"replica": receive})
    parts["seconds"] = time.perf_counter() - started
    if receipt.failures:
        raise RuntimeError(f"the push failed: {receipt.failures}")
    return parts


if __name__ == "__main__":
    sys.exit(main())
