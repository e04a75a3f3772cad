"""`fewstep serve`: what is checked before Ray starts, and the whole server asked by the real client."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tests.actors.serving.tiny import save_tiny
from tests.waiting import eventually

from fewstep.actors.serving.keys import make_key, write_keys
from fewstep.cluster import deploy, session
from fewstep.cluster.admission import check_access
from fewstep.cluster.deploy import ServeConfig, ServedEndpoint, serve_model
from fewstep.kernels.model.checkpoint import embedded_model
from fewstep.platform.errors import CheckpointError, ConfigError, ResourceError
from fewstep.platform.ports import free_port
from fewstep.platform.records import DecodePolicy

LONG: dict[str, Any] = {
    "model": "tiny", "prompt": "a long one", "max_tokens": 1900, "temperature": 0,
    "fewstep": {"kind": "static", "tokens_per_step": 1},
}  # fmt: skip

# A server that starts in twenty seconds on an idle machine takes ten times as long on a crowded one.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=["replicas", "proxy"])
def endpoint(folder: Path, request: pytest.FixtureRequest) -> Iterator[ServedEndpoint]:
    policy = DecodePolicy(threshold=0.5)
    config = ServeConfig(
        model=(str(folder), ""), port=0, num_replicas=2, cpus_per_replica=0.5, max_tokens=24, policy=policy,
        front=request.param,
    )  # fmt: skip
    with serve_model(config) as served:
        yield served


@pytest.fixture(scope="module")
def client(endpoint: ServedEndpoint) -> Iterator[OpenAI]:
    with OpenAI(base_url=endpoint.base_url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_free_port_is_found_and_a_taken_one_refused() -> None:
    with socket.create_server(("127.0.0.1", free_port("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"127.0.0.1:{port}: got a port in use"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_a_host_that_is_not_this_machine_is_refused(host: str) -> None:
    with pytest.raises(ResourceError, match="an address of this machine"):
        free_port(host, 0)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "_enter_session", lambda *_: pytest.fail("Ray was started"))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    "broken", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_a_broken_model_is_refused_before_ray_starts(folder: Path, tmp_path: Path, broken: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / broken).write_text("{% broken")
    with (
        pytest.raises(CheckpointError, match=str(copy)),
        serve_model(ServeConfig(model=str(copy), port=0)),
    ):
        pytest.fail("the block must not run")


@pytest.mark.usefixtures("no_ray")
def test_a_taken_port_is_refused_before_ray_starts(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServeConfig(model=str(folder), port=taken.getsockname()[1])
        with pytest.raises(ResourceError, match="a port in use"), serve_model(config):
            pytest.fail("the block must not run")


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_wide_address_needs_keys(folder: Path, tmp_path: Path, host: str) -> None:
    keys = tmp_path / "keys.json"
    with pytest.raises(ConfigError, match=f"host: got {host} without keys; .*`fewstep key NAME"):
        check_access(host, None)
    if host == "0.0.0.0":
        with pytest.raises(ConfigError), serve_model(ServeConfig(model=str(folder), host=host, port=0)):
            pytest.fail("the block must not run")
    write_keys(keys, [])
    with pytest.raises(ConfigError, match="at least one key"):
        check_access(host, keys)
    write_keys(keys, [make_key("ann")[1]])
    check_access(host, keys)
    check_access("localhost", None)


@pytest.mark.ray
def test_a_scrape_of_one_replica_shows_all(client: OpenAI, endpoint: ServedEndpoint) -> None:
    for _ in range(8):
        client.completions.create(model="tiny", prompt="abc")
    deadline = time.monotonic() + 60
    while True:
        families = {
            family.name: family
            for family in text_string_to_metric_families(httpx.get(f"{endpoint.url}/metrics").text)
        }
        replicas = {sample.labels["replica"] for sample in families["fewstep_running"].samples}
        if len(replicas) == 2:
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    answers = [
        sample.value for sample in families["fewstep_answers"].samples if sample.name.endswith("_total")
    ]
    assert sum(answers) >= 8


@pytest.mark.ray
def test_chat_completion_stream_stop_and_usage(client: OpenAI) -> None:
    sampled: dict[str, Any] = {"model": "tiny", "temperature": 1.0, "seed": 5, "max_tokens": 40}
    whole = client.completions.create(prompt="def f(x):", **sampled)
    text, usage = whole.choices[0].text, whole.usage
    assert len(text) > 8
    assert usage is not None
    assert usage.prompt_tokens == 9
    assert len(text) <= usage.completion_tokens <= 40  # a token a character; special ones show no text
    *pieces, last = client.completions.create(
        prompt="def f(x):", stream=True, stream_options={"include_usage": True}, **sampled
    )
    assert "".join(piece.choices[0].text for piece in pieces) == text
    assert last.usage is not None
    assert last.usage.completion_tokens == usage.completion_tokens
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "def f(x):"}], **sampled)
    assert chat.choices[0].message.content == text
    stopped = client.completions.create(prompt="def f(x):", stop=text[5:7], **sampled).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[5:7])], "stop")
    assert [model.id for model in client.models.list()] == ["tiny", "embedded"]
    other = client.completions.create(model="embedded", prompt="def f(xs):", max_tokens=8, temperature=0)
    assert other.model == "embedded"


@pytest.mark.ray
def test_errors_come_through_the_proxy_in_openais_shape(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", echo=True)
    assert (caught.value.param, caught.value.code) == ("echo", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


@pytest.mark.ray
def test_text_arrives_while_it_is_made_and_lost_readers_free_their_slots(endpoint: ServedEndpoint) -> None:
    stream = {"json": {**LONG, "stream": True}, "timeout": 60}
    pieces: list[Iterator[bytes]] = []
    started = time.monotonic()
    with ExitStack() as readers:
        # Several, for both replicas to have one.
        for _ in range(4):
            response = readers.enter_context(
                httpx.stream("POST", f"{endpoint.base_url}/completions", **stream)  # type: ignore[arg-type]
            )
            pieces.append(response.iter_bytes())  # kept: dropping the iterator closes the stream
            next(pieces[-1])
        assert any(health["running"] for health in health_of_replicas(endpoint))
    first = (time.monotonic() - started) / 4
    while any(health["running"] for health in health_of_replicas(endpoint)):
        assert time.monotonic() - started < 60
    assert all(health["forwards"] < LONG["max_tokens"] for health in health_of_replicas(endpoint))

    started = time.monotonic()
    whole = httpx.post(f"{endpoint.base_url}/completions", json=LONG, timeout=60).json()
    assert whole["usage"]["completion_tokens"] == LONG["max_tokens"]
    assert first < (time.monotonic() - started) / 2


def health_of_replicas(endpoint: ServedEndpoint) -> list[dict[str, Any]]:
    """The latest answer of each replica met in enough questions to meet all of them."""
    answers = [httpx.get(f"{endpoint.url}/health").json() for _ in range(12)]
    return list({answer["pid"]: answer for answer in answers}.values())


@pytest.mark.ray
def test_a_killed_replica_is_not_missed(client: OpenAI) -> None:
    pids = replicas()
    assert len(pids) == 2
    proxied = [process for process in psutil.Process().children(True) if "ProxyActor" in process.cmdline()[0]]
    os.kill(pids[0], signal.SIGKILL)
    # A connection that was open to a replica itself is gone with it; the openai client repeats such a request by default.
    patient = client if proxied else client.with_options(max_retries=2)
    for _ in range(20):
        patient.completions.create(model="tiny", prompt="abc")
        time.sleep(0.05)
    eventually(lambda: len(replicas()) == 2)


@pytest.mark.ray
def test_killed_engines_end_their_streams_with_the_reason_and_are_replaced(
    client: OpenAI, endpoint: ServedEndpoint
) -> None:
    eventually(lambda: len(_engines()) == 2, 120)  # one may still be starting
    engines = _engines()
    asked = {name: value for name, value in LONG.items() if name != "fewstep"}
    with client.completions.create(**asked, stream=True, extra_body={"fewstep": LONG["fewstep"]}) as stream:
        next(stream)
        for engine in itertools.chain.from_iterable(engines.values()):
            os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="SIGKILL") as caught:
            list(stream)
    assert "engine died" in caught.value.message
    eventually(lambda: len(_engines().keys() - engines.keys()) == 2, 120)
    assert not engines.keys() & _engines().keys()
    # Both replicas are gone with what was left of their engines; the new ones answer as soon as they have read the model.
    patient = client.with_options(max_retries=4)
    for _ in range(6):
        assert patient.completions.create(model="tiny", prompt="abc").usage is not None
    assert httpx.get(f"{endpoint.url}/health").status_code == 200


def _engines() -> dict[int, list[int]]:
    """The processes of the engines of each replica that has both of its models."""
    found = {}
    for pid in replicas():
        engines = [
            child.pid
            for child in psutil.Process(pid).children()
            if "fewstep.actors.engine.child" in child.cmdline()
        ]
        if len(engines) == 2:
            found[pid] = engines
    return found


def replicas() -> list[int]:
    """Processes of this session's replicas, by the title Ray Serve gives them."""
    own = session.process_tree(set(session._children(os.getpid())))
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in session._alive(own)}
    return sorted(pid for pid, title in titles.items() if title.startswith(b"ray::ServeReplica"))


@pytest.mark.ray
def test_the_command_serves_until_it_is_interrupted(folder: Path) -> None:
    port = free_port("127.0.0.1", 0)
    models = ["--model", str(folder), "--model", str(embedded_model())]
    command = [sys.executable, "-m", "fewstep", "serve", *models, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}/v1" in server.stdout.readline()
        httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
        listed = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["tiny", "embedded"]
        started = session.process_tree({server.pid})
        second = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert second.stderr.startswith(f"fewstep: error: 127.0.0.1:{port}: got a port in use")
        assert second.stderr.count("\n") == 1
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
    finally:
        server.kill()
        server.wait()
    assert session._alive(started) == []
    assert free_port("127.0.0.1", port) == port


@pytest.mark.ray
def test_sigterm_finishes_what_was_accepted(folder: Path, tmp_path: Path) -> None:
    port = free_port("127.0.0.1", 0)
    log = tmp_path / "requests.jsonl"
    command = [
        sys.executable, "-m", "fewstep", "serve", "--model", str(folder), "--port", str(port), "--log.file", str(log),
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1/completions"
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert "/v1" in server.stdout.readline()
        started = session.process_tree({server.pid})
        with httpx.stream("POST", url, json={**LONG, "stream": True}, timeout=120) as response:
            pieces = response.iter_bytes()
            next(pieces)
            server.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 60
            while (refused := httpx.post(url, json={**LONG, "max_tokens": 1}, timeout=60)).status_code == 200:
                assert time.monotonic() < deadline
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
        assert server.wait(60) == 0
        assert "drained" in server.stdout.read()
    finally:
        server.kill()
        server.wait()
    assert session._alive(started) == []
    assert f'"committed_tokens": {LONG["max_tokens"]}' in log.read_text()
