"""Every node of a cluster is sampled, by one sampler each, and one that goes away is left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.platform.mlflow_store import open_client, sqlite_uri

# A process of its own: a cluster of two nodes cannot share a process with the sessions of other tests.
PROGRAM = """
import json, sys, time
import ray
from ray.cluster_utils import Cluster
from fewstep.actors.node_metrics import OtherNodes
from fewstep.platform.errors import ResourceError
from fewstep.platform.mlflow_store import sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform import system_metrics
from pathlib import Path

system_metrics._INTERVAL_S = 1.0
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=0)
ray.init(address=cluster.address, log_to_driver=False)
with OtherNodes() as nodes, MlflowTracker(sqlite_uri(Path(sys.argv[1])), experiment="x", run_name="n") as tracker:
    (name, sample), = nodes.samples()
    deadline = time.monotonic() + 60
    while True:  # a fresh node's first worker takes its time
        try:
            first = sample()
            break
        except ResourceError:
            assert time.monotonic() < deadline
    tracker.watch(name, sample)
    time.sleep(4)
    cluster.remove_node(second, allow_graceful=False)
    time.sleep(8)
    print(json.dumps({"hosts": nodes.hosts, "name": name, "sample": sorted(first), "run": tracker.run_id}), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_driver_logs_every_node_and_outlives_one_that_dies(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    name = told["name"]
    assert set(told["hosts"]) == {"driver", name}
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= set(
        told["sample"]
    )
    client = open_client(sqlite_uri(tmp_path), create=False)
    own = client.get_metric_history(told["run"], "system/cpu_utilization_percentage")
    other = client.get_metric_history(told["run"], f"system/{name}/cpu_utilization_percentage")
    assert 1 <= len(other) < len(own), "the dead node's samples end, the driver's go on"
    assert f"system metrics of {name} end here" in done.stderr
