"""`fewstep up`, `status`, `submit`, `logs`, `cancel`, `down`: on two hosts, as a user types them."""

from __future__ import annotations

import json
import os
import socket
import zipfile
from pathlib import Path

import pytest
from tests.cluster.hosts import Hosts, open_hosts

from fewstep.__main__ import main
from fewstep.cluster.lifecycle.jobs import build_wheel

TINY = "steps=2,batch_size=2,checkpoint_every=1,trainer.num_ranks=1,warmup_steps=0,trainer.compiled=false"


def say(hosts: Hosts, *words: str, code: int = 0) -> str:
    with hosts.fewstep(0, *words) as process:
        text, _ = process.communicate(timeout=400)
    assert process.returncode == code, text
    return text


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.skipif("FEWSTEP_HOSTS" not in os.environ, reason="takes minutes: set FEWSTEP_HOSTS=1")
def test_a_cluster_of_two_hosts_from_up_to_down(tmp_path: Path) -> None:
    with open_hosts(2) as hosts:
        folder = f"folder={tmp_path / 'cluster'}"
        over = ["ssh=[ip, netns, exec]", f"hosts=[{hosts.names[1]}]", f"node_ip={hosts.addresses[0]}"]
        assert "up: " in say(hosts, "up", folder, *over, "num_cpus=2", "host_cpus=1", "object_store_mb=100")
        assert (tmp_path / "cluster" / "token").stat().st_mode & 0o777 == 0o600
        rows = json.loads(say(hosts, "status", folder, "show=json"))["hosts"]
        assert [(row["host"], row["alive"]) for row in rows] == [("this host", True), (hosts.names[1], True)]
        assert "already" in say(hosts, "up", folder, *over, code=2) or "down" in say(
            hosts, "up", folder, *over, code=2
        )

        store = f"tracking_uri=sqlite:///{tmp_path}/mlflow.db"
        job = ["job=pretrain", f"overrides=[{TINY},out={tmp_path / 'run'},'{store}']"]
        text = say(hosts, "submit", folder, *job)
        assert "job raysubmit_" in text
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()

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
