"""kill -9 of one of two replicas under load: what becomes of accepted requests, and when is everything back?"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from bench.serving_parts.replicas import left_behind, replica_processes, wait_until

from fewstep.cluster.deploy import ServeConfig, serve_model
from fewstep.cluster.load_client import LoadClient
from fewstep.cluster.loadtest import bodies
from fewstep.cluster.loadtest_settings import LoadtestConfig

CLIENTS = 16
BACK_S = 120.0


def measure(seconds: float) -> dict[str, Any]:
    """Load for so long, a kill after a quarter of it."""
    moments: dict[str, float] = {}
    config = ServeConfig(
        port=0, num_replicas=2, cpus_per_replica=0.5, max_sequences=32, log={"file": "/dev/null"}
    )
    with serve_model(config) as endpoint:
        load = LoadtestConfig(url=endpoint.url, clients=CLIENTS, seconds=seconds)
        client = LoadClient(
            f"{endpoint.base_url}/completions", bodies(load, endpoint.model), [], headers={}, timeout_s=60
        )
        wait_until(lambda: len(replica_processes()) == 2, BACK_S)

        def kill() -> None:
            time.sleep(seconds / 4)
            victim = replica_processes()[0]
            victim.kill()
            moments["killed"] = client.now
            wait_until(lambda: len([p for p in replica_processes() if p.pid != victim.pid]) == 2, BACK_S)
            moments["restarted"] = client.now

        killer = threading.Thread(target=kill)
        killer.start()
        asyncio.run(client.closed_loop(CLIENTS, 0, seconds))
        killer.join()
        left = left_behind(endpoint.url)
    killed = moments["killed"]
    in_flight = [sample for sample in client.samples if sample.sent < killed < sample.ended]
    later = [sample for sample in client.samples if sample.sent >= killed]
    failed = [sample for sample in [*in_flight, *later] if sample.error]
    errors: dict[str, int] = {}
    for sample in failed:
        errors[sample.error] = errors.get(sample.error, 0) + 1
    last_failure = max((sample.ended for sample in failed), default=killed)
    return {
        "recovery_s": max(last_failure - killed, max((s.ended for s in in_flight), default=killed) - killed),
        "unit": "seconds from kill -9 to the last failure, and to the end of every request that was in flight",
        "replica_back_s": moments["restarted"] - killed,
        "in_flight": len(in_flight),
        "in_flight_failed": sum(bool(sample.error) for sample in in_flight),
        "later": len(later),
        "later_failed": sum(bool(sample.error) for sample in later),
        "errors": errors,
        "left_behind": left,
        "settings": {"clients": CLIENTS, "replicas": 2, "seconds": seconds},
    }
