"""Real Ray Serve: replicas that come and go with the work left, and prompts that stay with whom has their beginning."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.waiting import eventually

from fewstep.__main__ import main
from fewstep.actors.serving.scaling_config import ScalingConfig
from fewstep.cluster.deploy import ServeConfig, serve_model

PROMPT = 'def f(xs):\n    """keep odd; sum"""\n'


def committed(url: str) -> dict[str, float]:
    """Tokens that each replica has committed; replicas that answered only."""
    page = httpx.get(f"{url}/metrics", timeout=60.0).raise_for_status().text
    return {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "fewstep_committed_tokens_total"
    }


def ask(client: httpx.Client, prompt: str, max_tokens: int = 40) -> str:
    body = {"model": "embedded", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    answer = client.post("/v1/completions", json=body, timeout=300.0)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


def running() -> int:
    from ray import serve

    (deployment,) = serve.status().applications["fewstep"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_replicas_come_with_the_load_and_go_with_it_and_no_request_is_lost() -> None:
    scaling = ScalingConfig(max_replicas=2, backlog_s=0.05, up_delay_s=0.5, down_delay_s=2.0, interval_s=0.25)
    config = ServeConfig(port=0, cpus_per_replica=0.5, max_sequences=4, scaling=scaling)
    stop, answers = threading.Event(), list[str]()

    def client() -> None:
        with httpx.Client(base_url=endpoint.url) as http:
            while not stop.is_set():
                answers.append(ask(http, PROMPT, max_tokens=40))

    with serve_model(config) as endpoint, httpx.Client(base_url=endpoint.url) as http:
        alone = ask(http, PROMPT)
        assert "return" in alone
        assert running() == 1
        with ThreadPoolExecutor(12) as pool:
            clients = [pool.submit(client) for _ in range(12)]
            try:
                eventually(lambda: running() == 2 or any(future.done() for future in clients), 240)
            finally:
                stop.set()
            for future in clients:
                future.result()  # a request that got no answer raises here
        assert running() == 2
        assert set(answers) == {alone}
        # One at a time is no work for two; what is asked while a replica leaves is answered, too.
        calm: list[str] = []

        def one_left() -> bool:
            calm.append(ask(http, PROMPT))
            return running() == 1

        eventually(one_left, 240)
        assert set(calm) == {alone}


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_prompts_beginning_has_a_home_among_replicas() -> None:
    config = ServeConfig(port=0, cpus_per_replica=0.5, num_replicas=2, routing="prefix")
    with serve_model(config) as endpoint, httpx.Client(base_url=endpoint.url) as http:
        shared = "# " + "x" * 300 + "\n"
        for number in range(8):
            ask(http, shared + f"def g{number}():\n", max_tokens=8)
        found = committed(endpoint.url)
        assert len(found) == 1, found
        for number in range(24):
            ask(http, f"# {number}\ndef g():\n", max_tokens=8)
        assert len(committed(endpoint.url)) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["front=replicas", "scaling.max_replicas=2"], "scaling.max_replicas"),
        (["front=replicas", "routing=prefix"], "routing=prefix"),
        (["num_replicas=2", "scaling.max_replicas=2"], "num_replicas"),
        (["scaling.min_replicas=3", "scaling.max_replicas=2"], "max_replicas"),
        (["scaling.min_replicas=3", "scaling.max_replicas=3"], "set num_replicas"),
        (["scaling.max_replica=2"], "did you mean scaling.max_replicas?"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
