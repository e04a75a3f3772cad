"""OpenTelemetry spans of requests: one for the request, below it one for each wait and each denoising."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fewstep.actors.serving.visit import AnswerRecord, Visit
from fewstep.platform.errors import ResourceError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_NANOSECONDS = 1_000_000_000


def require_tracing() -> None:
    """Raise a ResourceError if the packages that send spans are not installed."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            "trace_endpoint", f"no package {error.name}", "OpenTelemetry with its OTLP exporter",
            "pip install 'fewstep[tracing]'",
        ) from error  # fmt: skip


def open_tracer(endpoint: str) -> Tracer:
    """A tracer that sends spans to `endpoint` (OTLP over HTTP) from a thread of its own.

    Raises:
        ResourceError: the packages are not installed.
    """
    require_tracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "fewstep"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider.get_tracer("fewstep")


class Spans:
    """Turns finished visits into spans. They are made afterwards, from times that are taken anyway."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def record(self, visit: Visit, ended: float) -> None:
        """The spans of one request, children of the caller's span if it sent a `traceparent`.

        Args:
            ended: monotonic seconds.
        """
        from opentelemetry import trace
        from opentelemetry.propagate import extract

        def at(moment: float) -> int:
            return int((visit.started_at + moment - visit.started) * _NANOSECONDS)

        parent = extract({"traceparent": visit.traceparent}) if visit.traceparent else None
        fields = {f"fewstep.{name}": str(value) for name, value in visit.fields(ended - visit.started)}
        attributes: dict[str, Any] = {
            **fields, "http.request.method": visit.method, "http.route": visit.route,
            "http.response.status_code": visit.status,
        }  # fmt: skip
        root = self._tracer.start_span(
            f"{visit.method} {visit.route}",
            parent,
            trace.SpanKind.SERVER,
            attributes,
            start_time=at(visit.started),
        )
        if visit.status >= 500:
            root.set_status(trace.StatusCode.ERROR)
        within = trace.set_span_in_context(root)
        for answer in visit.answers:
            start = answer.started or ended
            wait = self._tracer.start_span("wait", within, start_time=at(answer.offered))
            wait.end(at(start))
            if answer.started:
                self._denoise(answer, within, at(start), at(answer.ended or ended))
        root.end(at(ended))

    def _denoise(self, answer: AnswerRecord, within: Any, start: int, end: int) -> None:
        attributes: dict[str, Any] = {
            "fewstep.model": answer.model, "fewstep.finish": answer.finish, "fewstep.blocks": answer.num_blocks,
            "fewstep.committed_tokens": answer.num_tokens, "fewstep.forwards": answer.forwards,
        }  # fmt: skip
        self._tracer.start_span("denoise", within, attributes=attributes, start_time=start).end(end)
