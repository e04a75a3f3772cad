"""`fewstep up`, `down`, `status`: Ray's servers on this host and on others, by process id and never by name.

`ray stop` ends every Ray on a machine. Here each host's `ray start --block` is one process whose end takes its servers with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fewstep.cluster.lifecycle.settings import ClusterFolder, StatusConfig, UpConfig
from fewstep.cluster.lifecycle.state import (
    ClusterState,
    Member,
    forget,
    is_up,
    load,
    member_environment,
    save,
    token_file,
)
from fewstep.cluster.session import WORKER_ENV, end_processes, process_start, process_tree
from fewstep.platform.errors import ResourceError
from fewstep.platform.ports import free_port

_READY_S = 120.0
_STOP_S = 20.0
_STARTED = "this node joined"


def up(config: UpConfig) -> None:
    """Starts the head here and a worker on every host; all or nothing, also when it is interrupted.

    Raises:
        ResourceError: a cluster is up already, a port is taken, or a host did not come up; what had started is ended. A host
            that had joined and cannot be asked to end its own stays known, for `fewstep down`; one that falls silent while
            it starts is to be looked at by hand.
    """
    if is_up(config.folder):
        raise ResourceError(
            str(config.folder), "a cluster that is up", "one cluster a folder", "`fewstep down` first"
        )
    free_port(config.node_ip, config.port)
    free_port("127.0.0.1", config.dashboard_port)
    config.folder.mkdir(parents=True, exist_ok=True)
    token = token_file(config.folder)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    state = ClusterState(
        f"{config.node_ip}:{config.port}", f"http://127.0.0.1:{config.dashboard_port}", config.ssh, ()
    )
    try:
        state = _joined(config, state, _start_head(config))
        for host in config.hosts:
            state = _joined(config, state, _start_worker(config, host))
    except BaseException:
        _stop(config.folder, state)
        raise
    hosts = ", ".join(member.host for member in state.members)
    print(
        f"up: {state.address} ({hosts})\njobs: fewstep submit; or --ray-address {state.address} with RAY_AUTH_MODE=token"
    )
    print(f"RAY_AUTH_TOKEN_PATH={token}")


def down(config: ClusterFolder) -> None:
    """Ends every host's servers, workers first.

    Raises:
        ResourceError: there is no cluster, or hosts are out of reach; those stay known, so that it can be said again.
    """
    lost = _stop(config.folder, load(config.folder))
    if lost:
        raise ResourceError(
            ", ".join(lost),
            "no way to end it",
            "hosts that can be reached",
            f"`fewstep down` again when they can; remove {config.folder} if they are gone for good",
        )
    print("down")


def status(config: StatusConfig) -> None:
    """Every host and whether its servers run. Raises ResourceError: there is no cluster."""
    state = load(config.folder)
    rows = [
        {"host": member.host, "pid": member.pid, "alive": _alive(state, member)} for member in state.members
    ]
    if config.show == "json":
        print(json.dumps({"address": state.address, "hosts": rows}, indent=2))
        return
    print(state.address)
    for row in rows:
        print(f"  {row['host']:<24} {'up' if row['alive'] else 'gone':<5} pid {row['pid']}")


def _joined(config: UpConfig, state: ClusterState, member: Member) -> ClusterState:
    state = ClusterState(state.address, state.dashboard, state.ssh, (*state.members, member))
    save(config.folder, state)
    return state


def _ray(*words: str) -> list[str]:
    return [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", *words]


def _start_head(config: UpConfig) -> Member:
    words = _ray(
        "--head", f"--node-ip-address={config.node_ip}", f"--port={config.port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={config.dashboard_port}", f"--object-store-memory={config.object_store_mb * 2**20}",
        # Left to its default, jobs could not be submitted beside another Ray on this host.
        f"--dashboard-agent-listen-port={free_port('127.0.0.1', 0)}",
        *([] if config.num_cpus is None else [f"--num-cpus={config.num_cpus}"]),
    )  # fmt: skip
    environment = os.environ | WORKER_ENV | member_environment(token_file(config.folder))
    if config.redis:
        environment["RAY_REDIS_ADDRESS"] = config.redis
    log = config.folder / "head.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    started = process_start(process.pid)
    member = Member("this host", process.pid, started or "")
    try:
        deadline = time.monotonic() + _READY_S
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ResourceError("ray", _last_line(log.read_text()), "a head that starts", f"see {log}")
            time.sleep(0.1)
    except BaseException:
        _end_here(member)  # nobody else knows of it yet
        raise
    return member


def _start_worker(config: UpConfig, host: str) -> Member:
    """Starts the worker in the background of a shell on the host; the token travels by standard input."""
    folder = f"/tmp/fewstep-{secrets.token_hex(4)}"
    environment = WORKER_ENV | member_environment(f"{folder}/token")
    words = _ray(
        f"--address={config.node_ip}:{config.port}", f"--object-store-memory={config.object_store_mb * 2**20}",
        *([] if config.host_cpus is None else [f"--num-cpus={config.host_cpus}"]),
    )  # fmt: skip
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    # The worker's address is the one it reaches the head from; a host with several would guess.
    script = f"""{_end_member()}
set -eu
umask 077
mkdir -p {folder}
printf %s {token_file(config.folder).read_text()} > {folder}/token
address=$(ip -o route get {shlex.quote(config.node_ip)} | sed -n 's/.* src \\([^ ]*\\).*/\\1/p')
export {exports}
setsid nohup {shlex.join(words)} "--node-ip-address=$address" < /dev/null > {folder}/worker.log 2>&1 &
pid=$!
started=$(started_of $pid)
echo "$pid $started" > {folder}/member
for _ in $(seq {_READY_S * 5:.0f}); do
  if grep -q 'Ray runtime started' {folder}/worker.log; then
    echo "{_STARTED} $pid $started"
    exit 0
  fi
  kill -0 $pid 2> /dev/null || break
  sleep 0.2
done
tail -n 1 {folder}/worker.log >&2
end_member $pid "$started" {folder}
exit 1
"""
    try:
        answer = _on(config.ssh, host, script, timeout_s=_READY_S + _STOP_S + 30)
    except BaseException:
        # Its shell may be at work still, or may have started what nobody here has been told of.
        unheard = f"""{_end_member()}
read -r pid started < {folder}/member || pid=0 started=
end_member "$pid" "$started" {folder}
"""
        with contextlib.suppress(ResourceError):
            _on(config.ssh, host, unheard)
        raise
    line = next((line for line in answer.stdout.splitlines() if line.startswith(_STARTED)), None)
    if line is None:
        raise ResourceError(
            f"host {host}",
            _last_line(answer.stderr or "no answer"),
            "a host that joins",
            "see `fewstep doctor` on it",
        )
    pid, started = line.removeprefix(_STARTED).split()
    return Member(host, int(pid), started, folder)


def _end_member() -> str:
    """The function `end_member PID STARTED FOLDER` of a host's shell.

    It ends the same process and no later one with its number; its servers are its own session's. The folder goes with it:
    the token is in it.
    """
    return f"""
started_of() {{ cut -d ' ' -f 22 "/proc/$1/stat" 2> /dev/null || true; }}
end_member() {{
  pid=$1 started=$2 folder=$3
  if [ -n "$started" ] && [ "$(started_of "$pid")" = "$started" ]; then
    kill -TERM "$pid" || true
    for _ in $(seq {_STOP_S * 5:.0f}); do [ "$(started_of "$pid")" = "$started" ] || break; sleep 0.2; done
    for stat in /proc/[0-9]*/stat; do
      set -- $(sed 's/.*) //' "$stat" 2> /dev/null)
      [ "${{4:-}}" != "$pid" ] || kill -KILL "$(basename "$(dirname "$stat")")" 2> /dev/null || true
    done
  fi
  rm -rf "$folder"
}}
"""


def _on(
    ssh: Sequence[str], host: str, script: str, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    command = [*ssh, host, "sh", "-s"]
    try:
        return subprocess.run(
            command, input=script, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(
            f"host {host}", error, "a host that answers", f"try `{shlex.join(command[:-2])}`"
        ) from error


def _stop(folder: Path, state: ClusterState) -> list[str]:
    """Ends members, the head last, and forgets the cluster but for the hosts that could not be asked, which it names."""
    lost = []
    for member in reversed(state.members[1:]):
        words = shlex.join([str(member.pid), member.started, member.folder])
        try:
            if _on(state.ssh, member.host, f"{_end_member()}\nend_member {words}").returncode:
                lost.append(member)
        except ResourceError:
            lost.append(member)
    if state.members:
        _end_here(state.members[0])
    if lost:
        save(folder, replace(state, members=(state.members[0], *reversed(lost))))
    else:
        forget(folder)
    return [member.host for member in lost]


def _alive(state: ClusterState, member: Member) -> bool:
    if member is state.members[0]:
        return process_start(member.pid) == member.started
    asked = _on(state.ssh, member.host, f"cut -d ' ' -f 22 /proc/{member.pid}/stat")
    return asked.stdout.strip() == member.started


def _end_here(member: Member) -> None:
    """Ends the head and everything it started; Ray's agents would follow only within a minute."""
    if process_start(member.pid) != member.started:
        return
    everything = process_tree({member.pid})
    os.kill(member.pid, signal.SIGTERM)
    end_processes(everything, _STOP_S)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no answer"
