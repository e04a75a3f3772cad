"""Many clients who come and go for a long time: does memory stay flat, does everything that was accepted end?"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import psutil
from bench.serving_parts.replicas import left_behind, replica_processes

from fewstep.cluster.deploy import ServeConfig, serve_model
from fewstep.cluster.load_client import LoadClient
from fewstep.cluster.loadtest import bodies
from fewstep.cluster.loadtest_settings import LoadtestConfig
from fewstep.pipelines.load_summary import abort_delays, summarise

SAMPLE_S = 2.0
# Pools, pages and caches fill at first; the slope is of what comes after.
WARM_SHARE = 0.3


def measure(minutes: float, clients: int) -> dict[str, Any]:
    """One soak. The slope is the least-squares line through the replica's resident memory after the warm-up."""
    sizes: list[tuple[float, int]] = []
    with serve_model(ServeConfig(port=0, max_sequences=32, log={"file": "/dev/null"})) as endpoint:
        config = LoadtestConfig(
            url=endpoint.url, clients=clients, seconds=60 * minutes, abort_share=0.3, abort_within_s=0.5
        )
        client = LoadClient(
            f"{endpoint.base_url}/completions", bodies(config, endpoint.model),
            abort_delays(config.abort_share, config.abort_within_s, 100_000, config.seed), headers={}, timeout_s=120,
        )  # fmt: skip
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(replica_processes(), sizes, stop))
        watcher.start()
        try:
            asyncio.run(client.closed_loop(clients, 0, config.seconds))
        finally:
            stop.set()
            watcher.join()
        left = left_behind(endpoint.url)
    report = summarise(client.samples, max(sample.ended for sample in client.samples))
    times, bytes_ = np.array([moment for moment, _ in sizes]), np.array([size for _, size in sizes], float)
    later = times >= WARM_SHARE * times[-1]
    slope = float(np.polyfit(times[later], bytes_[later], 1)[0]) * 60
    kept = ("requests", "answered", "aborted", "errors", "committed_tokens_per_s", "tokens_per_forward",
            "first_block_s", "request_s")  # fmt: skip
    return {
        "minutes": minutes,
        "clients": clients,
        "rss_slope_bytes_per_min": slope,
        "rss_first_bytes": int(bytes_[0]),
        "rss_last_bytes": int(bytes_[-1]),
        "errors_5xx": report["errors_5xx"],
        "not_ended": sum(not sample.ended for sample in client.samples),
        "left_behind": left,
        **{key: report[key] for key in kept},
    }


def _watch(processes: list[psutil.Process], sizes: list[tuple[float, int]], stop: threading.Event) -> None:
    started = time.monotonic()
    while True:
        sizes.append((time.monotonic() - started, sum(process.memory_info().rss for process in processes)))
        if stop.wait(SAMPLE_S):
            return
