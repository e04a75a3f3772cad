"""A real Ray over three hosts: what a cut cable, a slow link and a head that restarts cost. Hosts are namespaces."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.hosts import PORT, ROOT, Hosts, command_of, open_hosts
from tests.cluster.redis_server import redis_server

from fewstep.cluster.session import process_start

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),
]

REFINE = [
    "refine", "steps=8", "checkpoint_every=4", "prompts_per_step=8", "group_size=2", "num_eval_tasks=8", "num_replicas=2",
    "num_verifiers=2", "sweep.thresholds=[0.9]", "sweep.tokens_per_step=[]", "trainer.num_ranks=1", "layout=split",
]  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with open_hosts(3) as found:
        found.head(1)
        found.join(1, 2)
        found.join(2, 2)
        yield found


def findings(hosts: Hosts, *words: str) -> tuple[int, list[dict[str, str]]]:
    address = f"address={hosts.addresses[0]}:{PORT}"
    with hosts.fewstep(0, "doctor", address, "show=json", *words) as process:
        text, _ = process.communicate(timeout=600)
    assert "{" in text, text
    return process.returncode, json.JSONDecoder().raw_decode(text[text.index("{") :])[0]["findings"]


def test_the_doctor_sees_every_host_and_a_slow_link(hosts: Hosts, tmp_path: Path) -> None:
    # 2 MB/s; a link of this machine's memory moves more than ten times the bound, on a busy machine too.
    hosts.slow(2, rate_mbit=16)
    try:
        code, found = findings(hosts, "min_gloo_mb_per_s=5", f"shared_folder={tmp_path}")
    finally:
        hosts.slow(2, rate_mbit=0)
    assert {item["node"] for item in found if item["check"] == "sandbox"} == set(hosts.addresses)
    by_check = {item["check"]: item["status"] for item in found}
    assert (by_check["versions"], by_check["storage"], by_check["clock"]) == ("ok", "ok", "ok")
    links = {
        item["found"].partition(" - ")[2].partition(";")[0]: item for item in found if item["check"] == "gloo"
    }
    assert {there: item["status"] for there, item in links.items()} == {
        hosts.addresses[1]: "ok",
        hosts.addresses[2]: "wrong",
    }, links
    assert code == 2


def test_a_refinement_over_hosts_survives_a_cut_cable_and_the_host_comes_back(
    hosts: Hosts, tmp_path: Path
) -> None:
    out, address = tmp_path / "run", f"{hosts.addresses[0]}:{PORT}"
    store = f"tracking_uri=sqlite:///{tmp_path}/mlflow.db"
    lines = []
    with hosts.fewstep(0, *REFINE, "--ray-address", address, f"out={out}", store) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("refine    2/8"):
                hosts.cable(2, "down")
    assert process.returncode == 0, "".join(lines[-40:])
    places = json.loads((out / "placement.json").read_text())
    trainer, *others = [
        {item["node"] for item in places if item["role"] == role} for role in ("trainer ranks", "replicas")
    ]
    assert len(trainer) == 1
    assert others[0] == set(hosts.addresses) - trainer  # a replica on each other host
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 8
    assert report["replicas_replaced"] >= 1

    # Healed, the host is a stranger: its raylet ended when it was declared dead. It joins anew.
    hosts.kill(2)
    hosts.cable(2, "up")
    hosts.join(2, 2)
    _, found = findings(hosts, "bandwidth=false")
    assert {item["node"] for item in found if item["check"] == "python"} == set(hosts.addresses)


ASK = """
import json, sys, urllib.request
body = {"model": "embedded", "prompt": "def f(xs):\\n    \\"\\"\\"keep odd; sum\\"\\"\\"", "max_tokens": 40, "temperature": 0}
request = urllib.request.Request(sys.argv[1] + "/completions", json.dumps(body).encode(), {"content-type": "application/json"})
for _ in range(int(sys.argv[2])):
    with urllib.request.urlopen(request, timeout=120) as answer:
        print(json.load(answer)["choices"][0]["text"].count("return"))
"""


def test_a_service_over_hosts_answers_on_when_one_of_them_dies(hosts: Hosts) -> None:
    address = f"address={hosts.addresses[0]}:{PORT}"
    # A replica takes all CPUs of a host, so that each of the two has one.
    words = ["serve", address, "num_replicas=2", "cpus_per_replica=2", "port=18000", "name=embedded"]

    def ask(count: int) -> list[str]:
        with hosts.start(0, sys.executable, "-c", ASK, "http://127.0.0.1:18000/v1", str(count)) as process:
            text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
        return text.split()

    with hosts.fewstep(0, *words) as server:
        assert server.stdout is not None
        assert any(line.startswith("serving embedded") for line in server.stdout)
        try:
            assert ask(6) == ["1"] * 6
            on_host = [pid for pid in hosts.pids(2) if "ServeReplica" in command_of(pid)]
            assert len(on_host) == 1
            hosts.kill(2)
            assert ask(12) == ["1"] * 12
        finally:
            server.send_signal(signal.SIGINT)
            server.stdout.read()
            server.wait(300)


def test_a_head_that_restarts_finds_its_actors_again_in_redis(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, ray
        ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], namespace="fewstep", log_to_driver=False)
        if sys.argv[3] == "make":
            class Count:
                n = 0
                def up(self):
                    self.n += 1
                    return self.n
            actor = ray.remote(num_cpus=1)(Count).options(name="count", lifetime="detached").remote()
        else:
            actor = ray.get_actor("count")
        print("answer", ray.get(actor.up.remote(), timeout=240), flush=True)
        """
    )

    def ask(hosts: Hosts, what: str) -> str:
        words = [sys.executable, "-c", script, f"{hosts.addresses[0]}:{PORT}", hosts.addresses[1], what]
        with hosts.start(1, *words) as process:
            text, _ = process.communicate(timeout=400)
        return text

    with (
        open_hosts(2) as hosts,
        redis_server(tmp_path, prefix=hosts.inside(1), bind=hosts.addresses[1], port=6399) as redis,
    ):
        hosts.head(0, RAY_REDIS_ADDRESS=redis)
        hosts.join(1, 1)
        assert "answer 1" in ask(hosts, "make")
        hosts.kill(0)
        assert hosts.pids(0) == []
        time.sleep(1)
        hosts.head(0, RAY_REDIS_ADDRESS=redis)
        # The same process answers: it counts on.
        assert "answer 2" in ask(hosts, "again")


KEEP = """
import subprocess, time
from tests.cluster.hosts import open_hosts
with open_hosts(1) as hosts:
    sleeper = subprocess.Popen([*hosts.inside(0), "sleep", "600"], start_new_session=True)
    print(hosts.tag, hosts.folder, sleeper.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_hosts_leave_nothing_behind_however_the_tests_end(number: signal.Signals) -> None:
    with open_hosts(1):
        pass  # skips where there are no namespaces
    command = [sys.executable, "-c", KEEP]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as tests:
        assert tests.stdout is not None
        tag, folder, sleeper = tests.stdout.readline().split()
        assert process_start(int(sleeper)) is not None
        tests.send_signal(number)
    deadline = time.monotonic() + 120
    while process_start(int(sleeper)) or tag in namespaces() or Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
