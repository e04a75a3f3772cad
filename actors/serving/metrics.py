"""Prometheus metrics of one replica, and the page that shows all replicas.

A scrape reaches one replica, whichever the proxy picks. So each answers for all: it asks the others for their families
and tells the samples apart by the label `replica`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fewstep.actors.serving.visit import AnswerRecord, Visit

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# From a tiny model on a CPU (a block in milliseconds) to a large one under load.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TPF = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


class Measured(Protocol):
    """What has the numbers of an engine: an EngineHost."""

    def measures(self) -> dict[str, float]: ...


class ServingMetrics:
    """Everything one replica counts.

    Args:
        engines: the engines by model name, asked at every scrape.
        num_waiting: answers that wait at the desk, by model.
    """

    def __init__(
        self, engines: Callable[[], Mapping[str, Measured]], num_waiting: Callable[[], Mapping[str, int]]
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "fewstep_requests", "HTTP requests answered.", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge("fewstep_requests_in_flight", "HTTP requests open now.", registry=registry)
        self._refused = Counter(
            "fewstep_refused", "Requests refused, by reason.", ["reason"], registry=registry
        )
        self._answers = Counter(
            "fewstep_answers",
            "Answers ended: stop, length, abort or error.",
            ["model", "finish"],
            registry=registry,
        )
        self._tokens = Counter("fewstep_committed_tokens", "Committed tokens.", ["model"], registry=registry)
        self._prompt = Counter("fewstep_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self._answer_forwards = Counter(
            "fewstep_answer_forwards",
            "Forwards an answer took part in, summed.",
            ["model"],
            registry=registry,
        )
        self._seconds = self._histogram("fewstep_request_seconds", "A request from start to end.", "route")
        self._queue = self._histogram("fewstep_queue_seconds", "Wait of an answer for its slot.", "model")
        self._first = self._histogram(
            "fewstep_first_block_seconds", "Arrival to first committed text.", "model"
        )
        self._block = self._histogram("fewstep_block_seconds", "Between two commits of an answer.", "model")
        self._tpf = Histogram(
            "fewstep_tokens_per_forward", "Committed tokens per forward of an answer.", ["model"],
            registry=registry, buckets=_TPF,
        )  # fmt: skip
        registry.register(_EngineCollector(engines, num_waiting))

    def note_block(self, record: AnswerRecord, seconds: float) -> None:
        """Some text of an answer has been committed, `seconds` after the one before or, for the first, the arrival."""
        (self._block if record.num_blocks else self._first).labels(record.model).observe(seconds)

    def note_start(self, record: AnswerRecord, waited_s: float) -> None:
        """An answer has its slot."""
        self._queue.labels(record.model).observe(waited_s)
        self._prompt.labels(record.model).inc(record.num_prompt_tokens)

    def note_end(self, record: AnswerRecord) -> None:
        """An answer has ended, whichever way."""
        self._answers.labels(record.model, record.finish).inc()
        self._tokens.labels(record.model).inc(record.num_tokens)
        self._answer_forwards.labels(record.model).inc(record.forwards)
        if record.forwards:
            self._tpf.labels(record.model).observe(record.num_tokens / record.forwards)

    def note_request(self, visit: Visit, seconds: float) -> None:
        """A request is over."""
        self._requests.labels(visit.route, str(visit.status)).inc()
        self._seconds.labels(visit.route).observe(seconds)
        if visit.refused:
            self._refused.labels(visit.refused).inc()

    def families(self) -> list[Metric]:
        """What a scrape of this replica alone would show."""
        return list(self.registry.collect())

    def _histogram(self, name: str, documentation: str, label: str) -> Histogram:
        return Histogram(name, documentation, [label], registry=self.registry, buckets=_SECONDS)


def page(families: Mapping[str, Sequence[Metric]]) -> bytes:
    """The families of several replicas in Prometheus' text format; samples carry their replica's name."""
    merged: dict[str, Metric] = {}
    for replica, metrics in sorted(families.items()):
        for metric in metrics:
            into = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            into.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in metric.samples
            ]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(merged.values()))
    return generate_latest(registry)


class _Fixed(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


# metric, documentation, the key of `EngineHost.measures`
_COUNTERS = (
    ("fewstep_forwards", "Forwards of the engine, each over all its running requests.", "forwards"),
    ("fewstep_rows", "Rows of those forwards; divided by them, the rows per forward.", "rows"),
    ("fewstep_prefix_hits", "Blocks found in the prefix cache.", "prefix_hits"),
    ("fewstep_prefix_misses", "Blocks looked for in the prefix cache and not found.", "prefix_misses"),
    ("fewstep_preemptions", "Requests that gave their pages up and recomputed.", "preemptions"),
    ("fewstep_weight_swaps", "Times the engine has taken other weights.", "weight_swaps"),
)


class _EngineCollector(Collector):
    """Counts that the engine keeps anyway, read when somebody asks."""

    def __init__(
        self, engines: Callable[[], Mapping[str, Measured]], num_waiting: Callable[[], Mapping[str, int]]
    ) -> None:
        self._engines, self._num_waiting = engines, num_waiting

    def collect(self) -> Iterable[Metric]:
        measured = {name: engine.measures() for name, engine in self._engines().items()}
        for metric, documentation, key in _COUNTERS:
            family = CounterMetricFamily(metric, documentation, labels=["model"])
            for name, values in measured.items():
                family.add_metric([name], values[key])
            yield family
        waiting = self._num_waiting()
        running = GaugeMetricFamily("fewstep_running", "Answers in a slot.", labels=["model"])
        queue = GaugeMetricFamily("fewstep_waiting", "Answers that wait for a slot.", labels=["model"])
        batch = GaugeMetricFamily("fewstep_batch_occupancy", "Share of slots in use.", labels=["model"])
        pages = GaugeMetricFamily(
            "fewstep_pages",
            "Pages of keys and values: used, cached for reuse, free.",
            labels=["model", "state"],
        )
        drift = GaugeMetricFamily(
            "fewstep_cache_drift", "Mean drift of approximate caches.", labels=["model"]
        )
        for name, values in measured.items():
            running.add_metric([name], values["num_running"])
            queue.add_metric([name], values["num_waiting"] + waiting.get(name, 0))
            batch.add_metric([name], values["num_running"] / max(1.0, values["num_slots"]))
            free, cached = values["pages_free"], values["pages_cached"]
            pages.add_metric([name, "free"], free)
            pages.add_metric([name, "cached"], cached)
            pages.add_metric([name, "used"], values["pages_total"] - free - cached)
            drift.add_metric([name], values["cache_drift"])
        yield from (running, queue, batch, pages, drift)
