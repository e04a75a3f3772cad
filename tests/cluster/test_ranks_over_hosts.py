"""One replica whose ranks are on two hosts: it answers, and a cut cable between them is an error and not a silence."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from tests.cluster.hosts import PORT, Hosts, command_of, open_hosts

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
]

ASK = """
import json, sys, urllib.error, urllib.request
body = {"model": "embedded", "prompt": "def f(xs):\\n    \\"\\"\\"keep odd; sum\\"\\"\\"", "max_tokens": 40, "temperature": 0}
request = urllib.request.Request(sys.argv[1] + "/completions", json.dumps(body).encode(), {"content-type": "application/json"})
try:
    with urllib.request.urlopen(request, timeout=120) as answer:
        print(answer.status, json.load(answer)["choices"][0]["text"].count("return"))
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""


@contextmanager
def serving(hosts: Hosts, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = ["serve", f"address={hosts.addresses[0]}:{PORT}", "port=18000", "name=embedded", *words]
    with hosts.fewstep(0, *command) as server:
        assert server.stdout is not None
        seen = []
        for line in server.stdout:
            seen.append(line)
            if line.startswith("serving embedded"):
                break
        else:
            pytest.fail("".join(seen))
        try:
            yield server
        finally:
            server.send_signal(signal.SIGINT)
            server.stdout.read()
            server.wait(120)


def ask(hosts: Hosts) -> str:
    with hosts.start(0, sys.executable, "-c", ASK, "http://127.0.0.1:18000/v1") as process:
        text, _ = process.communicate(timeout=240)
    return text


def on_host(hosts: Hosts, host: int, title: str) -> list[int]:
    return [pid for pid in hosts.pids(host) if command_of(pid).startswith(title)]


def test_a_replica_over_two_hosts_answers_and_a_cut_cable_is_an_error() -> None:
    with open_hosts(3) as hosts:
        hosts.head(1)
        hosts.join(1, 2)
        hosts.join(2, 2)
        # Each rank takes all CPUs of a host, so no host has two of them.
        words = ["tensor_parallel=2", "cpus_per_replica=2", "ranks_on=any_node", "rank_deadline_s=2"]
        with serving(hosts, *words):
            assert ask(hosts).split() == ["200", "1"]
            leading = [host for host in (1, 2) if on_host(hosts, host, "ray::ServeReplica")]
            following = [host for host in (1, 2) if on_host(hosts, host, "ray::RankActor")]
            assert sorted([*leading, *following]) == [1, 2]
            # They talk to each other over the hosts' own addresses. Rank 0 is a child of the replica, which has
            # connections of Ray's to the other rank.
            (pid,) = on_host(hosts, following[0], "ray::RankActor")
            (replica,) = on_host(hosts, leading[0], "ray::ServeReplica")
            leaders = {child.pid for child in psutil.Process(replica).children(recursive=True)}
            of_leader = connections(hosts, leading[0], leaders)
            assert {(other, own) for own, other in connections(hosts, following[0], {pid})} & of_leader
            hosts.cable(following[0], "down")
            started = time.monotonic()
            failed = ask(hosts)
            assert time.monotonic() - started < 60
            assert failed.startswith("503"), failed
            assert "rank 1 of 2" in failed, failed


def connections(hosts: Hosts, host: int, pids: set[int]) -> set[tuple[str, str]]:
    """Own and other end of what some processes of a host have open, as address:port."""
    command = [*hosts.inside(host), "ss", "-tnpH", "state", "established"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {
        (line.split()[2], line.split()[3]) for line in lines if any(f"pid={pid}," in line for pid in pids)
    }
