"""The Grafana dashboard asks for nothing that is not exported, and shows what operators were promised."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fewstep.actors.serving.metrics import ServingMetrics

DASHBOARD = Path(__file__).resolve().parents[2] / "examples" / "serving" / "grafana.json"
MEASURES = (
    "forwards", "rows", "prefix_hits", "prefix_misses", "preemptions", "weight_swaps", "num_running", "num_waiting",
    "num_slots", "pages_free", "pages_cached", "pages_total", "cache_drift",
)  # fmt: skip


class OneEngine:
    def measures(self) -> dict[str, float]:
        return dict.fromkeys(MEASURES, 1.0)


def exported() -> set[str]:
    """Every name a query can use, by the type of its metric."""
    metrics = ServingMetrics(lambda: {"m": OneEngine()}, lambda: {"m": 0})
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    return {metric.name + ending for metric in metrics.families() for ending in endings[metric.type]}


def queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]] + [
        entry["query"]["query"] for entry in dashboard["templating"]["list"] if entry["type"] == "query"
    ]


def test_every_query_names_exported_metrics() -> None:
    names = exported()
    for query in queries():
        used = set(re.findall(r"fewstep_\w+", query))
        assert used, query
        assert used <= names, query


def test_every_metric_has_a_panel() -> None:
    used = set(re.findall(r"fewstep_\w+", " ".join(queries())))
    unused = {name for name in exported() if not name.endswith(("_count", "_sum"))} - used
    assert unused == set()
