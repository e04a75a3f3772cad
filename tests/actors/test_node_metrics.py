"""Every node of a cluster is sampled, by one sampler each, and one that goes away is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.actors.own_process import told

from fewstep.platform.mlflow_store import open_client, sqlite_uri

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
    found, errors = told(PROGRAM, str(tmp_path))
    name = found["name"]
    assert set(found["hosts"]) == {"driver", name}
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= set(
        found["sample"]
    )
    client = open_client(sqlite_uri(tmp_path), create=False)
    own = client.get_metric_history(found["run"], "system/cpu_utilization_percentage")
    other = client.get_metric_history(found["run"], f"system/{name}/cpu_utilization_percentage")
    assert 1 <= len(other) < len(own), "the dead node's samples end, the driver's go on"
    assert f"system metrics of {name} end here" in errors
