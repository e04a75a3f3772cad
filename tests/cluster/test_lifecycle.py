"""`fewstep up`, `status`, `submit`, `logs`, `cancel`, `down`: on two hosts, as a user types them."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.cluster.hosts import ROOT, Hosts, open_hosts
from tests.waiting import eventually

from fewstep.__main__ import main
from fewstep.cluster.lifecycle import up as lifecycle
from fewstep.cluster.lifecycle.jobs import build_wheel
from fewstep.cluster.lifecycle.settings import UpConfig
from fewstep.cluster.lifecycle.state import ClusterState, Member, load, save
from fewstep.cluster.session import process_start, process_tree
from fewstep.platform.errors import ResourceError
from fewstep.platform.ports import free_port

TINY = "steps=2,batch_size=2,checkpoint_every=1,trainer.num_ranks=1,warmup_steps=0,trainer.compiled=false"


def say(hosts: Hosts, *words: str, code: int = 0, cwd: Path = ROOT) -> str:
    with hosts.fewstep(0, *words, cwd=cwd) as process:
        text, _ = process.communicate(timeout=600)
    assert process.returncode == code, text
    return text


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_cluster_of_two_hosts_from_up_to_down(tmp_path: Path) -> None:
    with ExitStack() as stack, open_hosts(2) as hosts:
        folder = f"folder={tmp_path / 'cluster'}"
        over = ["ssh=[ip, netns, exec]", f"hosts=[{hosts.names[1]}]", f"node_ip={hosts.addresses[0]}"]
        assert "up: " in say(hosts, "up", folder, *over, "num_cpus=2", "host_cpus=1", "object_store_mb=100")
        assert (tmp_path / "cluster" / "token").stat().st_mode & 0o777 == 0o600
        (remote,) = [member.folder for member in load(tmp_path / "cluster").members if member.folder]
        stack.callback(shutil.rmtree, remote, ignore_errors=True)  # where this fails before `down`
        assert (Path(remote) / "token").stat().st_mode & 0o777 == 0o600
        rows = json.loads(say(hosts, "status", folder, "show=json"))["hosts"]
        assert [(row["host"], row["alive"]) for row in rows] == [("this host", True), (hosts.names[1], True)]
        assert "already" in say(hosts, "up", folder, *over, code=2) or "down" in say(
            hosts, "up", folder, *over, code=2
        )

        store = f"tracking_uri=sqlite:///{tmp_path}/mlflow.db"
        # A relative `out` is below the folder that the job was submitted in, where what looks like the package's own parts
        # may lie; and there the same job finds its checkpoint again.
        for name in ("platform", "fewstep"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(
                "raise AssertionError('imported from the working folder')\n"
            )
        job = ["job=pretrain", f"overrides=[{TINY},out=runs/tiny,'{store}']"]
        text = say(hosts, "submit", folder, *job, cwd=tmp_path)
        assert "job raysubmit_" in text
        assert (tmp_path / "runs" / "tiny" / "model" / "model.safetensors").is_file()
        assert "resumed at step 1" in say(hosts, "submit", folder, *job, cwd=tmp_path)

        longer = [
            "job=pretrain",
            f"overrides=[{TINY.replace('steps=2', 'steps=100000', 1)},out={tmp_path / 'long'},'{store}']",
        ]
        name = (
            say(hosts, "submit", folder, "follow=false", "wheel=false", *longer).split("job ")[-1].split()[0]
        )
        assert f"cancelled {name}" in say(hosts, "cancel", folder)
        assert "stopped" in say(hosts, "logs", name, folder, code=1)

        assert say(hosts, "down", folder).endswith("down\n")
        assert hosts.pids(0) == hosts.pids(1) == []
        assert "no cluster" in say(hosts, "status", folder, code=2)
        assert not (tmp_path / "cluster" / "token").exists()
        assert not Path(remote).exists()


def test_the_wheel_of_a_checkout_holds_every_floor_and_the_model(tmp_path: Path) -> None:
    names = zipfile.ZipFile(build_wheel(tmp_path)).namelist()
    for part in (
        "platform/config.py",
        "kernels/model/embedded/model.safetensors",
        "actors/engine/engine.py",
        "cluster/commands.py",
    ):
        assert f"fewstep/{part}" in names
    assert "fewstep/__main__.py" in names


@pytest.mark.parametrize("command", ["down", "status", "logs", "cancel"])
def test_without_a_cluster_there_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, f"folder={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "start one with `fewstep up`" in error
    assert error.count("\n") == 1


def test_a_taken_port_and_a_job_that_is_none_are_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        assert main(["up", f"folder={tmp_path / 'c'}", f"port={busy.getsockname()[1]}"]) == 2
    assert "in use" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert main(["submit", f"folder={tmp_path}", "job=refin"]) == 2
    assert "did you mean refine?" in capsys.readouterr().err
    assert main(["submit", f"folder={tmp_path}", "overrides=[step=3]"]) == 2
    assert "did you mean steps?" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_that_is_interrupted_leaves_no_head(number: signal.Signals, tmp_path: Path) -> None:
    ports = [f"{key}={free_port('127.0.0.1', 0)}" for key in ("port", "dashboard_port")]
    command = [sys.executable, "-m", "fewstep", "up", f"folder={tmp_path / 'c'}", "num_cpus=1", *ports]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        # The head's own servers are what would be left; the first of them is there long before the head is ready.
        eventually(lambda: len(process_tree({process.pid})) > 2)
        assert not (tmp_path / "c" / "cluster.json").exists()
        started = process_tree({process.pid})
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert [pid for pid, start in started.items() if process_start(pid) == start] == []
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["head.log"]


@pytest.fixture
def same_machine(tmp_path: Path) -> tuple[str, Path]:
    """What stands in the place of `ssh`, and a file that makes every host unreachable as long as it is there."""
    cut, script = tmp_path / "cut", tmp_path / "ssh"
    script.write_text(f'#!/bin/sh\n[ ! -e {cut} ] || exit 255\nshift\nexec "$@"\n')
    script.chmod(0o700)
    return str(script), cut


def test_a_down_that_loses_a_host_can_be_said_again(
    same_machine: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ssh, cut = same_machine
    monkeypatch.setattr(lifecycle, "_STOP_S", 1.0)
    remote, folder = tmp_path / "remote", tmp_path / "c"
    remote.mkdir()
    folder.mkdir()
    (remote / "token").write_text("secret")
    # A head that has ended, and a host's process with a server in its session that does not end with it.
    with subprocess.Popen(["true"]) as ended:
        head = Member("this host", ended.pid, process_start(ended.pid) or "")
    with subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600 & wait"], start_new_session=True) as worker:
        eventually(lambda: len(process_tree({worker.pid})) == 2)
        tree = process_tree({worker.pid})
        member = Member("far", worker.pid, tree[worker.pid], str(remote))
        save(folder, ClusterState("127.0.0.1:1", "http://127.0.0.1:2", (ssh,), (head, member)))
        cut.touch()
        assert main(["down", f"folder={folder}"]) == 2
        assert "far" in capsys.readouterr().err
        assert load(folder).members == (head, member)
        assert (remote / "token").exists()
        cut.unlink()
        assert main(["down", f"folder={folder}"]) == 0
        assert worker.wait(timeout=10) == -signal.SIGKILL
    assert [pid for pid, start in tree.items() if process_start(pid) == start] == []
    assert not remote.exists()
    assert list(folder.iterdir()) == []


@pytest.mark.ray
@pytest.mark.skipif(shutil.which("ip") is None, reason="no `ip` (Debian's iproute2)")
@pytest.mark.parametrize("silent", [False, True])
def test_a_worker_that_misses_its_deadline_is_ended_with_what_was_written_for_it(
    silent: bool, same_machine: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh, _ = same_machine
    # Nobody is at the head's address, and a worker knocks there for longer than this.
    monkeypatch.setattr(lifecycle, "_READY_S", 2.0)
    monkeypatch.setattr(lifecycle, "_STOP_S", 2.0)
    tag = secrets.token_hex(4)
    monkeypatch.setattr(secrets, "token_hex", lambda _: tag)
    remote = Path(f"/tmp/fewstep-{tag}")
    config = UpConfig(folder=tmp_path, ssh=(ssh,), port=free_port("127.0.0.1", 0))
    (tmp_path / "token").write_text("secret")
    if silent:
        # The connection is lost while its shell waits: only another command can end what that has started.
        on = lifecycle._on
        monkeypatch.setattr(
            lifecycle,
            "_on",
            lambda ssh, host, text, timeout_s=60.0: on(
                ssh, host, text, min(timeout_s, 1.0) if "setsid" in text else timeout_s
            ),
        )
    with pytest.raises(ResourceError):
        lifecycle._start_worker(config, "near")
    assert not remote.exists()
    assert all(f"--address=127.0.0.1:{config.port}" not in words for words in commands())


def commands() -> Iterator[str]:
    """The command line of every process."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().decode(errors="replace")
        except OSError:
            continue
