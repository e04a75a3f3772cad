"""`fewstep serve tensor_parallel=2`: the text of one rank over HTTP, what a lost rank costs, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fewstep.actors.bundles import Node
from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.serving.model_source import ModelSource
from fewstep.cluster import session
from fewstep.cluster.deploy import ServeConfig, checked_sources, require_places
from fewstep.cluster.serve_plan import plan
from fewstep.cluster.served_models import check_sharding
from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.platform.errors import ConfigError, ResourceError
from fewstep.platform.ports import free_port
from fewstep.platform.records import DecodePolicy, WeightVersion

pytestmark = pytest.mark.timeout(900)

PROMPT = 'def f(xs):\n    """keep odd; sum"""'
ASKED = {"model": "embedded", "prompt": PROMPT, "max_tokens": 48}
SLOW = {"fewstep": {"kind": "static", "tokens_per_step": 1}, "max_tokens": 480, "prompt": "a", "n": 8}


def test_ranks_that_do_not_divide_the_heads_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel: got 3, .* num_key_value_heads of 4"):
        checked_sources(ServeConfig(tensor_parallel=3), "127.0.0.1")


def test_a_model_with_an_adapter_is_refused_by_name() -> None:
    source = ModelSource("mine", str(embedded_model()), adapter="runs/lora/adapter")
    check_sharding(source, 1)
    with pytest.raises(ConfigError, match=r"tensor_parallel: got 2, and 'mine' has an adapter"):
        check_sharding(source, 2)


def test_the_plan_states_what_each_rank_holds() -> None:
    lines = dict(plan(ServeConfig(tensor_parallel=2, port=0)))
    assert lines["replicas"] == "1 of 2 ranks on one node, each of 1 CPUs, each with every model"
    assert lines["ranks"].startswith("2: 1.7 MiB of weights on the first, 1.5 MiB on each other, 64.0 MiB")


@pytest.mark.parametrize(
    ("words", "free", "told"),
    [
        ({"tensor_parallel": 2}, (1.0, 1.0), "got 1 replica of 2 CPU.*10.0.0.0 1 CPU, 10.0.0.1 1 CPU.*any_node"),
        ({"tensor_parallel": 2, "num_replicas": 2}, (3.0, 1.0), "got 2 replica of 2 CPU"),
        ({"tensor_parallel": 2, "cpus_per_replica": 1.5, "ranks_on": "any_node"}, (2.0, 1.0), "got 2 rank of 1.5 CPU"),
        ({"cpus_per_replica": 2.0}, (1.0, 1.0), "got 1 replica of 2 CPU"),
        ({"tensor_parallel": 2}, (0.0, 2.0), ""),
        ({"tensor_parallel": 2, "ranks_on": "any_node"}, (1.0, 1.0), ""),
        ({"tensor_parallel": 2, "num_replicas": 2, "cpus_per_replica": 0.1}, (0.2, 0.2), ""),
    ],
)  # fmt: skip
def test_cpus_that_suffice_only_in_total_are_refused_with_what_each_node_has(
    words: dict[str, Any], free: tuple[float, ...], told: str
) -> None:
    nodes = [Node(f"n{index}", f"10.0.0.{index}", cpus) for index, cpus in enumerate(free)]
    with pytest.raises(ResourceError, match=told) if told else nullcontext():
        require_places(ServeConfig(**words), nodes)


def one_rank(seed: int, temperature: float) -> str:
    """What an engine in this process answers."""
    model, tokenizer = load_model(embedded_model())
    engine = Engine(model, tokenizer, max_sequences=4, weight_version=WeightVersion("one", 0, "0"))
    policy = DecodePolicy(seed=seed, temperature=temperature)
    request = Request("one", tuple(tokenizer.encode(PROMPT).ids), policy, max_tokens=48)
    return engine.text_of(engine.generate([request])[0])


def ranks_of(server: subprocess.Popen[str]) -> list[int]:
    return titled(server, "ray::RankActor")


def titled(server: subprocess.Popen[str], beginning: str) -> list[int]:
    titles = {process.pid: process.cmdline() for process in psutil.Process(server.pid).children(True)}
    return [pid for pid, title in titles.items() if title and title[0].startswith(beginning)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    other = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(embedded_model(), other)
    port = free_port("127.0.0.1", 0)
    # The CPUs of one replica and no more: the next one starts where the one that has lost a rank was.
    cpus = str(len(os.sched_getaffinity(0)) / 2 + 0.5)
    command = [
        sys.executable, "-m", "fewstep", "serve", "tensor_parallel=2", f"cpus_per_replica={cpus}", "--port", str(port),
        "--model", str(embedded_model()), "--model", str(other),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "/v1" in process.stdout.readline()
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.communicate()


def answer(url: str, **fields: Any) -> str:
    response = httpx.post(f"{url}/completions", json=ASKED | fields, timeout=120)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@pytest.mark.ray
@pytest.mark.parametrize(("seed", "temperature"), [(3, 0.0), (3, 0.7), (4, 0.7)])
def test_the_text_is_that_of_one_rank(
    server: tuple[subprocess.Popen[str], str], seed: int, temperature: float
) -> None:
    expected = one_rank(seed, temperature)
    assert len(expected) > 10
    for model in ("embedded", "other"):
        assert answer(server[1], model=model, seed=seed, temperature=temperature) == expected


@pytest.mark.ray
def test_torch_is_where_the_model_is_and_not_in_the_replica(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    (replica,), (rank,) = titled(server[0], "ray::ServeReplica"), ranks_of(server[0])
    assert "libtorch" not in Path(f"/proc/{replica}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{rank}/maps").read_text()


@pytest.mark.ray
def test_a_killed_rank_is_named_and_the_service_recovers(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    expected = answer(url, temperature=0)
    (rank,) = ranks_of(process)
    ended: list[httpx.Response] = []

    def ask() -> None:
        ended.append(httpx.post(f"{url}/completions", json=ASKED | SLOW, timeout=120))

    asking = threading.Thread(target=ask)
    asking.start()
    while not running(url):
        assert asking.is_alive(), ended[0].text
    os.kill(rank, signal.SIGKILL)
    asking.join()
    assert ended[0].status_code == 503, ended[0].text
    assert "rank 1 of 2" in ended[0].text, ended[0].text
    # Three processes start anew; what that takes on a busy machine is bounded by the test's own limit.
    while not answers(url):
        assert process.poll() is None
        time.sleep(0.2)
    assert answer(url, temperature=0) == expected
    assert len(ranks_of(process)) == 1
    assert rank not in ranks_of(process)


def answers(url: str) -> bool:
    try:
        return httpx.post(f"{url}/completions", json=ASKED, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def running(url: str) -> int:
    health = httpx.get(f"{url.removesuffix('/v1')}/health", timeout=60)
    return int(json.loads(health.text).get("running", 0))


@pytest.mark.ray
def test_sigterm_leaves_no_process(server: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = server
    started = session.process_tree({process.pid})
    assert ranks_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0
    assert session._alive(started) == []
