"""The desk in front of a real engine, over a real socket: who is let in, for how long, and what is written down."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tests.actors.serving.conftest import listening

from fewstep.actors.serving.access_log import LogConfig
from fewstep.actors.serving.desk import Desk, DeskOptions
from fewstep.actors.serving.keys import make_key, write_keys
from fewstep.actors.serving.limits import LimitsConfig
from fewstep.actors.serving.metrics import page
from fewstep.actors.serving.service import CompletionService
from fewstep.actors.serving.tracing import Spans, open_tracer
from fewstep.platform.errors import ResourceError

SHORT: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 16, "temperature": 0}
LONG: dict[str, Any] = {
    "model": "tiny", "prompt": "a long one", "max_tokens": 1900, "seed": 0, "temperature": 0,
    "fewstep": {"kind": "static", "tokens_per_step": 1},
}  # fmt: skip

Start = Callable[..., tuple[str, Desk]]


@pytest.fixture
def start(service: CompletionService, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with a desk; returns its address and the desk."""
    with ExitStack() as stack:

        def started(**options: Any) -> tuple[str, Desk]:
            options.setdefault("log", LogConfig(file=tmp_path / "requests.jsonl"))
            desk = Desk(replace(DeskOptions(), **options), lambda: {"tiny": service.host})
            return stack.enter_context(listening(service, desk=desk)), desk

        yield started


def ask(url: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def samples(desk: Desk) -> dict[str, float]:
    """Values of all samples, labels but the interesting ones summed away."""
    found: dict[str, float] = {}
    for metric in desk.metrics.families():
        for sample in metric.samples:
            kept = {
                key: value for key, value in sample.labels.items() if key in ("status", "finish", "reason")
            }
            name = sample.name + "".join(f":{value}" for value in kept.values())
            found[name] = found.get(name, 0.0) + sample.value
    return found


def test_keys_are_asked_for_and_health_is_not(start: Start, tmp_path: Path) -> None:
    key, entry = make_key("ann")
    write_keys(tmp_path / "keys.json", [entry])
    url, _ = start(keys=tmp_path / "keys.json")
    for wrong in ("none", key + "x"):
        with (
            pytest.raises(openai.AuthenticationError) as caught,
            OpenAI(base_url=f"{url}/v1", api_key=wrong) as client,
        ):
            client.completions.create(**SHORT)
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200
    with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        assert client.completions.create(**SHORT).choices[0].text
    # A line is written when its answer has been sent.
    until(lambda: '"ann"' in (tmp_path / "requests.jsonl").read_text())
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [line.get("key") for line in lines if line["status"] == 200 and line["path"] != "/health"] == [
        "ann"
    ]
    assert key not in (tmp_path / "requests.jsonl").read_text()


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_above_the_limit_is_413(start: Start, declared: bool) -> None:
    url, _ = start(limits=LimitsConfig(max_body_bytes=1000))
    body = json.dumps({**SHORT, "prompt": "a" * 2000}).encode()
    content = body if declared else iter([body[:900], body[900:]])
    response = httpx.post(f"{url}/v1/completions", content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert ask(url, SHORT).status_code == 200


def test_a_deadline_ends_a_request_and_frees_its_slot(start: Start, service: CompletionService) -> None:
    url, desk = start()
    response = ask(url, LONG, **{"x-fewstep-deadline-s": "0.1"})
    assert (response.status_code, response.json()["error"]["code"]) == (408, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"
    response = ask(url, {**LONG, "stream": True}, **{"x-fewstep-deadline-s": "0.3"})
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert response.status_code == 200
    assert json.loads(events[-1])["error"]["code"] == "deadline_exceeded"
    until(lambda: service.host.stats()["running"] == 0)
    until(lambda: samples(desk).get("fewstep_refused_total:deadline") == 2)
    assert samples(desk)["fewstep_answers_total:error"] == 2
    for wrong in ("soon", "-1", "nan"):
        response = ask(url, SHORT, **{"x-fewstep-deadline-s": wrong})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "x-fewstep-deadline-s")


def test_the_servers_own_deadline_holds_for_all(start: Start) -> None:
    url, _ = start(limits=LimitsConfig(request_seconds=0.1))
    assert ask(url, LONG, **{"x-fewstep-deadline-s": "60"}).status_code == 408


def test_a_full_queue_is_429_with_retry_after_and_the_waiting_are_served(
    start: Start, service: CompletionService
) -> None:
    url, desk = start(limits=LimitsConfig(max_waiting=2))
    slots = service.host.num_slots
    answers: list[int] = []
    body = {**LONG, "max_tokens": 200}
    threads = [
        threading.Thread(target=lambda: answers.append(ask(url, body).status_code)) for _ in range(slots + 3)
    ]
    for thread in threads:
        thread.start()
    until(lambda: desk.num_waiting()["tiny"] == 2)
    refused = ask(url, SHORT)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    for thread in threads:
        thread.join()
    assert answers == [200] * (slots + 3)
    until(lambda: samples(desk).get("fewstep_refused_total:queue_full") == 1)
    assert desk.num_waiting() == {"tiny": 0}


def test_a_key_that_has_used_its_tokens_waits_and_another_does_not(start: Start, tmp_path: Path) -> None:
    (greedy, one), (modest, two) = make_key("greedy"), make_key("modest")
    write_keys(tmp_path / "keys.json", [one.model_copy(update={"tokens_per_minute": 5.0}), two])
    url, _ = start(keys=tmp_path / "keys.json")
    assert ask(url, SHORT, authorization=f"Bearer {greedy}").status_code == 200
    refused = ask(url, SHORT, authorization=f"Bearer {greedy}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 60
    assert ask(url, SHORT, authorization=f"Bearer {modest}").status_code == 200


def test_more_tokens_than_a_request_may_ask_for_are_refused_by_name(start: Start) -> None:
    url, _ = start(limits=LimitsConfig(request_tokens=40))
    refused = ask(url, {**SHORT, "n": 3})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    assert ask(url, {**SHORT, "n": 2}).status_code == 200


def test_draining_finishes_what_was_accepted_and_takes_nothing_new(start: Start) -> None:
    url, desk = start()
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 300, "stream": True}
    ) as response:
        pieces = response.iter_bytes()
        next(pieces)
        assert desk.drain() == 1
        refused = ask(url, SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "5"
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
    until(lambda: desk.drain() == 0)


def test_metrics_count_what_happened(start: Start) -> None:
    url, desk = start()
    before = samples(desk)
    usage = [ask(url, SHORT).json()["usage"] for _ in range(3)]
    assert ask(url, {**SHORT, "max_tokens": -1}).status_code == 400
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as response:
        next(response.iter_bytes())
    until(lambda: samples(desk).get("fewstep_answers_total:abort") == 1)
    text = httpx.get(f"{url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    found = samples(desk)

    def grown(name: str) -> float:
        return found.get(name, 0.0) - before.get(name, 0.0)

    assert grown("fewstep_requests_total:400") == 1
    assert grown("fewstep_requests_total:200") >= 4
    assert grown("fewstep_first_block_seconds_count") == 4
    assert grown("fewstep_committed_tokens_total") >= sum(entry["completion_tokens"] for entry in usage)
    assert grown("fewstep_answer_forwards_total") >= sum(entry["fewstep"]["forwards"] for entry in usage)
    assert grown("fewstep_forwards_total") > 0
    assert grown("fewstep_rows_total") > grown("fewstep_forwards_total")
    assert found["fewstep_pages"] > 0
    assert {sample.labels["replica"] for family in families.values() for sample in family.samples} == {"0"}
    assert {sample.labels["route"] for sample in families["fewstep_requests"].samples} <= {
        "/v1/completions", "/metrics", "other",
    }  # fmt: skip


def test_a_page_of_two_replicas_keeps_their_samples_apart(start: Start) -> None:
    url, desk = start()
    ask(url, SHORT)
    families = desk.metrics.families()
    merged = list(text_string_to_metric_families(page({"a": families, "b": families}).decode()))
    names = [family.name for family in merged]
    assert len(names) == len(set(names))
    tokens = next(family for family in merged if family.name == "fewstep_committed_tokens")
    assert {sample.labels["replica"] for sample in tokens.samples if sample.name.endswith("_total")} == {
        "a",
        "b",
    }


def test_answers_that_nobody_reads_leave_nothing_behind(start: Start, service: CompletionService) -> None:
    url, desk = start()
    for _ in range(20):
        with (
            httpx.Client() as client,
            client.stream("POST", f"{url}/v1/completions", json={**LONG, "n": 4, "stream": True}),
        ):
            pass
    until(lambda: desk.num_open == 0 and service.host.stats()["running"] == 0)
    line = desk._lines[service.host]
    assert (line.num_running, line.num_waiting) == (0, 0)


def test_the_log_has_numbers_and_no_text_unless_asked(start: Start, tmp_path: Path) -> None:
    url, _ = start()
    secret = {**SHORT, "prompt": "a private matter", "user": "line\nbreak \u2028 \x1b[2J"}
    answer = ask(url, secret)
    ask(url, {**secret, "bogus": "private too"})
    until(lambda: (tmp_path / "requests.jsonl").read_text().count("\n") == 2)
    text = (tmp_path / "requests.jsonl").read_text()
    first, second = [json.loads(line) for line in text.splitlines()]
    assert "private" not in text
    assert "\x1b" not in text
    assert first["id"] == answer.headers["x-request-id"]
    assert (first["status"], first["user"], first["model"]) == (200, secret["user"], "tiny")
    usage = answer.json()["usage"]
    assert (first["prompt_tokens"], first["committed_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert first["forwards"] == usage["fewstep"]["forwards"]
    assert 0 < first["first_block_seconds"] <= first["seconds"]
    assert second["status"] == 400
    url, _ = start(log=LogConfig(file=tmp_path / "open.jsonl", prompts=True))
    ask(url, secret)
    assert "a private matter" in json.loads((tmp_path / "open.jsonl").read_text())["body"]


def test_a_request_is_a_span_with_its_waits_and_denoisings(start: Start) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    url, desk = start()
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    desk._spans = Spans(provider.get_tracer("test"))
    caller = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    ask(url, {**SHORT, "n": 2}, traceparent=caller)
    until(lambda: len(exporter.get_finished_spans()) == 5)
    spans = exporter.get_finished_spans()
    root = next(span for span in spans if span.name == "POST /v1/completions")
    assert f"{root.context.trace_id:032x}" == "ab" * 16
    assert sorted(span.name for span in spans) == ["POST /v1/completions"] + ["denoise"] * 2 + ["wait"] * 2
    for span in spans:
        assert span is root or (span.parent is not None and span.parent.span_id == root.context.span_id)
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time
    assert not any("abc" in str(value) for span in spans for value in (span.attributes or {}).values())


def test_spans_without_their_packages_are_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter", None)
    with pytest.raises(ResourceError, match=r"pip install 'fewstep\[tracing\]'"):
        open_tracer("http://127.0.0.1:4318/v1/traces")
