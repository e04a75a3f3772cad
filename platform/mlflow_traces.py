"""Sampled answers as MLflow traces.

Written through the tracing client, not through spans that open and close in this process: those go to MLflow's global
provider and address, and could not be told a second time after an outage. Here every id is chosen when the trace is
made, so a repetition meets its first time.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fewstep.platform.mlflow_store import import_mlflow
from fewstep.platform.rollout_trace import RolloutTrace

_PREVIEW_CHARACTERS = 1000


def trace_payload(trace: RolloutTrace) -> dict[str, Any]:
    """The trace as JSON."""
    return {
        "trace_id": trace.trace_id,
        "request": plain_text(trace.request),
        "response": plain_text(trace.response),
        "tags": {key: plain_text(str(value)) for key, value in trace.tags.items()},
        "feedback": dict(trace.feedback),
        "spans": [
            {
                "name": span.name,
                "start_ns": span.start_ns,
                "end_ns": span.end_ns,
                "inputs": plain_json(span.inputs),
                "outputs": plain_json(span.outputs),
                "attributes": plain_json(span.attributes),
                "failed": span.failed,
            }
            for span in trace.spans
        ],
    }


def write_trace(client: Any, experiment_id: str, run_id: str, payload: Mapping[str, Any]) -> None:
    """Writes one trace, linked to its run; a repetition changes nothing."""
    entities, spans = import_mlflow("mlflow.entities"), import_mlflow("mlflow.entities.span")
    trace_id, stages = f"tr-{payload['trace_id']}", payload["spans"]
    start_ns = min(stage["start_ns"] for stage in stages)
    end_ns = max(stage["end_ns"] for stage in stages)
    failed = any(stage["failed"] for stage in stages)
    root = {
        "name": "answer",
        "start_ns": start_ns,
        "end_ns": end_ns,
        "inputs": {"prompt": payload["request"]},
        "outputs": {"completion": payload["response"]},
        "attributes": payload["tags"],
        "failed": failed,
    }
    metadata = {"mlflow.sourceRun": run_id}
    info = entities.TraceInfo(
        trace_id=trace_id,
        trace_location=entities.TraceLocation.from_experiment_id(experiment_id),
        request_time=start_ns // 1_000_000,
        execution_duration=(end_ns - start_ns) // 1_000_000,
        state=entities.TraceState.ERROR if failed else entities.TraceState.OK,
        request_preview=payload["request"][:_PREVIEW_CHARACTERS],
        response_preview=payload["response"][:_PREVIEW_CHARACTERS],
        trace_metadata=metadata,
        tags={"mlflow.traceName": "rollout", **payload["tags"]},
        assessments=_assessments(trace_id, payload["feedback"], end_ns // 1_000_000),
    )
    tree = [_span(spans.Span, trace_id, 0, root, None)]
    tree += [_span(spans.Span, trace_id, number, stage, 0) for number, stage in enumerate(stages, start=1)]
    # The only way in that takes finished spans; MlflowClient's own calls go to the process's global tracer.
    tracing = client._tracing_client
    tracing.start_trace(info)
    tracing.log_spans(experiment_id, tree)


def plain_text(text: str) -> str:
    """Text that every store can hold: model-written programs may contain lone surrogates and NULs."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def plain_json(value: Any) -> Any:
    """JSON whose texts every store can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return plain_text(value) if isinstance(value, str) else value


def _span_id(trace_id: str, number: int) -> bytes:
    return hashlib.blake2b(f"{trace_id}/{number}".encode(), digest_size=8).digest()


def _span(factory: Any, trace_id: str, number: int, stage: Mapping[str, Any], parent: int | None) -> Any:
    attributes = {
        "mlflow.traceRequestId": trace_id,
        "mlflow.spanType": "CHAIN" if parent is None else "TASK",
        "mlflow.spanInputs": stage["inputs"],
        "mlflow.spanOutputs": stage["outputs"],
        **stage["attributes"],
    }
    return factory.from_dict(
        {
            "trace_id": base64.b64encode(bytes.fromhex(trace_id.removeprefix("tr-"))).decode(),
            "span_id": base64.b64encode(_span_id(trace_id, number)).decode(),
            "parent_span_id": "" if parent is None else base64.b64encode(_span_id(trace_id, parent)).decode(),
            "name": stage["name"],
            "start_time_unix_nano": stage["start_ns"],
            "end_time_unix_nano": stage["end_ns"],
            "status": {
                "code": "STATUS_CODE_ERROR" if stage["failed"] else "STATUS_CODE_OK",
                "message": "",
            },
            "attributes": {key: json.dumps(value) for key, value in attributes.items()},
            "events": [],
        }
    )


def _assessments(trace_id: str, feedback: Mapping[str, Any], time_ms: int) -> list[Any]:
    entities = import_mlflow("mlflow.entities")
    source = entities.AssessmentSource(source_type="CODE", source_id="fewstep")
    found = [
        entities.Feedback(
            name=name, value=value, source=source, create_time_ms=time_ms, last_update_time_ms=time_ms
        )
        for name, value in feedback.items()
    ]
    for item in found:
        digest = hashlib.blake2b(f"{trace_id}/{item.name}".encode(), digest_size=16).hexdigest()
        item.trace_id, item.assessment_id = trace_id, f"a-{digest}"
    return found
