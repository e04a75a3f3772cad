"""`fewstep doctor`: each check is shown the real thing in order and out of order."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
from tests.cluster.redis_server import redis_server

from fewstep.__main__ import main
from fewstep.actors.collectives import local_gloo_bytes_per_s
from fewstep.cluster.doctor import host
from fewstep.cluster.doctor.nodes import compare_versions, gloo_finding, skew_finding

QUICK = ["bandwidth=false", "ports=[]"]


def test_a_sound_host_is_said_to_be_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--show", "json", *QUICK]) == 0
    report = json.loads(capsys.readouterr().out)
    by_check = {finding["check"]: finding for finding in report["findings"]}
    assert report["healthy"]
    assert {
        "python",
        "torch",
        "cuda",
        "triton",
        "deepspeed",
        "shared memory",
        "disk",
        "sandbox",
        "mlflow",
    } == set(by_check)
    assert sys.version.split()[0] in by_check["python"]["found"]
    assert "seccomp" in by_check["sandbox"]["found"] or by_check["sandbox"]["status"] == "note"


def test_what_is_wrong_is_a_line_with_its_fix_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "min_disk_gb=1e9", "tracking_uri=http://127.0.0.1:9", *QUICK]) == 2
    out, err = capsys.readouterr()
    disk = next(line for line in out.splitlines() if "disk" in line)
    assert disk.startswith("wrong")
    assert "fix: free some space" in disk
    assert any(line.startswith("wrong") and "mlflow" in line for line in out.splitlines())
    assert "2 wrong (mlflow, disk)" in err
    assert err.count("\n") == 1


def test_a_port_in_use_is_noted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        number = busy.getsockname()[1]
        (finding,) = host.ports((number,))
        assert finding.status == "note"
        assert "in use" in finding.found
    assert host.ports((number,))[0].status == "ok"


def test_a_redis_that_is_away_and_a_port_that_is_no_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path) as address:
        assert host.redis(address).status == "ok"
    away = host.redis(address)
    assert away.status == "wrong"
    assert "forgets the cluster" in away.fix
    assert host.redis("nonsense").status == "wrong"


def test_gloo_is_really_measured() -> None:
    rate = local_gloo_bytes_per_s()
    assert gloo_finding("here", rate, 0.0).status == "ok"
    assert gloo_finding("here", rate, rate).status == "wrong"  # MB against bytes


def test_no_compiler_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert host.deepspeed(build=False).status == "wrong"


def test_nodes_with_different_versions_are_named() -> None:
    mine = host.versions()
    assert mine["torch"] != "missing"
    assert compare_versions({"a": mine, "b": mine})[0].status == "ok"
    (finding,) = compare_versions({"a": mine, "b": mine, "c": mine | {"ray": "2.9.0"}})
    assert finding.status == "wrong"
    assert "ray: " in finding.found
    assert "on a and b" in finding.found
    assert "2.9.0 on c" in finding.found


@pytest.mark.parametrize(
    ("offset_s", "status"), [(0.2, "ok"), (-1.05, "ok"), (1.3, "wrong"), (-90.0, "wrong")]
)
def test_a_clock_is_wrong_by_more_than_the_question_took(offset_s: float, status: str) -> None:
    assert skew_finding("10.0.0.2", offset_s, 0.1, 1.0).status == status
