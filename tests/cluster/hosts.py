"""Hosts on one machine: network namespaces with addresses of their own on one switch, and a real Ray over them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORT = 26400
DASHBOARD_PORT = 28265
# A node is dead after half a minute of silence: Ray's defaults take minutes, and a node that waits for a core is silent, too.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "6000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_raylet_start_wait_time_s": "180",
    # As in a session of our own: at Ray's nice 15 whatever else the machine does leaves workers no time to start in.
    "RAY_worker_niceness": "0",
}
# Whatever ends the tests, a signal or SIGKILL included, ends their end of this process's standard input, and with that the
# hosts, everything that runs on them and their folder.
_REAPER = """
import os, shutil, signal, subprocess, sys, time
sys.stdin.buffer.read()
folder, *names = sys.argv[1:]
deadline = time.monotonic() + 60
for name in names:
    while time.monotonic() < deadline:
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        if not found:
            break
        for pid in found:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
shutil.rmtree(folder, ignore_errors=True)
"""


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@dataclass
class Hosts:
    """Namespaces `names`, host i with the address 10.231.x.(i + 1); the switch is a namespace, too."""

    tag: str
    names: list[str]
    addresses: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def inside(self, host: int) -> list[str]:
        """What to put before a command that runs on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def start(self, host: int, *words: str, cwd: Path = ROOT, **more: str) -> subprocess.Popen[str]:
        """A command on a host, both outputs in one pipe."""
        return subprocess.Popen(
            [*self.inside(host), *words], env=self.environment | more, cwd=cwd, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def fewstep(self, host: int, *words: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
        return self.start(host, sys.executable, "-P", "-m", "fewstep", *words, cwd=cwd)

    def ray(self, host: int, *words: str, **more: str) -> None:
        """`ray start` on a host; returns when it runs."""
        address = ["--node-ip-address", self.addresses[host], "--temp-dir", str(self.folder / "r")]
        binary = str(Path(sys.executable).parent / "ray")
        common = ["--object-store-memory", "100000000", "--disable-usage-stats"]
        # Ray's own servers keep a pipe open for as long as they live, so its words go to a file.
        log = self.folder / f"ray-{host}.log"
        with log.open("wb") as out:
            done = subprocess.run(
                [*self.inside(host), binary, "start", *address, *common, *words],
                env=self.environment | more, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                timeout=300, check=False, start_new_session=True,
            )  # fmt: skip
        assert done.returncode == 0, log.read_text()

    def head(self, cpus: int = 1, **more: str) -> str:
        """Ray's head on host 0; returns its address."""
        # Namespaces share processes and files: `ray start` would take a raylet on another host for a head of this one.
        (self.folder / "r" / "ray_current_cluster").unlink(missing_ok=True)
        self.ray(
            0, "--head", "--port", str(PORT), "--num-cpus", str(cpus), "--include-dashboard", "false", **more
        )
        return f"{self.addresses[0]}:{PORT}"

    def join(self, host: int, cpus: int = 1) -> None:
        self.ray(host, "--address", f"{self.addresses[0]}:{PORT}", "--num-cpus", str(cpus))

    def cable(self, host: int, state: str) -> None:
        """`down` cuts the host off; `up` heals it."""
        run("ip", "-n", self.names[host], "link", "set", "eth", state)

    def slow(self, host: int, rate_mbit: int) -> None:
        """Everything the host sends is slow; 0 = as it was."""
        device = ["tc", "-n", self.names[host], "qdisc"]
        if not rate_mbit:
            run(*device, "del", "dev", "eth", "root")
            return
        # A token bucket and not netem, which is a module that many kernels come without.
        limit = ["rate", f"{rate_mbit}mbit", "burst", "64k", "latency", "200ms"]
        run(*device, "replace", "dev", "eth", "root", "tbf", *limit)

    def pids(self, host: int) -> list[int]:
        done = subprocess.run(
            ["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in done.stdout.split()]

    def kill(self, host: int, only: Sequence[int] = ()) -> None:
        """Power off: SIGKILL to every process of the host, or to some."""
        for pid in only or self.pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not only and self.pids(host) and time.monotonic() < deadline:
            time.sleep(0.05)


@contextmanager
def open_hosts(count: int) -> Iterator[Hosts]:
    """So many hosts for the length of a block; skips the test where namespaces cannot be made."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"no `{tool}` (Debian's iproute2): hosts need network namespaces")
    tag = secrets.token_hex(2)
    net = 1 + int(tag, 16) % 250
    names = [f"fs{tag}-{index}" for index in range(count)]
    switch = f"fs{tag}-sw"
    folder = Path(tempfile.mkdtemp(prefix="fs", dir="/tmp"))
    hosts = Hosts(tag, names, [f"10.231.{net}.{index + 1}" for index in range(count)], folder)
    reaper = subprocess.Popen(
        [sys.executable, "-c", _REAPER, str(folder), *names, switch],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        try:
            _wire(hosts, switch)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        hosts.environment = kept | HEALTH | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        yield hosts
    finally:
        reaper.communicate(timeout=120)


def _wire(hosts: Hosts, switch: str) -> None:
    run("ip", "netns", "add", switch)
    run("ip", "-n", switch, "link", "add", "name", "sw0", "type", "bridge")
    run("ip", "-n", switch, "link", "set", "sw0", "up")
    for index, (name, address) in enumerate(zip(hosts.names, hosts.addresses, strict=True)):
        run("ip", "netns", "add", name)
        run(
            "ip",
            "link",
            "add",
            "eth",
            "netns",
            name,
            "type",
            "veth",
            "peer",
            "name",
            f"p{index}",
            "netns",
            switch,
        )
        run("ip", "-n", switch, "link", "set", f"p{index}", "master", "sw0")
        run("ip", "-n", switch, "link", "set", f"p{index}", "up")
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth")
        for device in ("lo", "eth"):
            run("ip", "-n", name, "link", "set", device, "up")


def command_of(pid: int) -> str:
    """A process's command line; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
