"""The Ray session: what it refuses, what it hands down, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tests.waiting import eventually

from fewstep.cluster import session as session_module
from fewstep.cluster.session import WORKER_ENV, free_resources, ray_session, require_resources
from fewstep.platform.errors import ResourceError


def test_local_resources_are_checked_before_anything_starts() -> None:
    before = set(session_module._children(os.getpid()))
    with (
        pytest.raises(ResourceError, match=r"CPU: got 3 asked for; allowed: at most 2 "),
        ray_session(2, need={"CPU": 3}),
    ):
        pytest.fail("the block must not run")
    assert set(session_module._children(os.getpid())) == before


def test_num_cpus_of_a_joined_cluster_is_refused() -> None:
    with pytest.raises(ResourceError, match="num_cpus"), ray_session(2, address="127.0.0.1:1"):
        pytest.fail("the block must not run")


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_A", "old")
    monkeypatch.delenv("FEWSTEP_B", raising=False)
    with session_module.environment_of({"FEWSTEP_A": "new", "FEWSTEP_B": "new"}):
        assert os.environ["FEWSTEP_A"] == os.environ["FEWSTEP_B"] == "new"
    assert os.environ["FEWSTEP_A"] == "old"
    assert "FEWSTEP_B" not in os.environ


def test_a_users_auth_mode_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert session_module._own_token(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_stubborn_process_is_killed() -> None:
    stubborn = subprocess.Popen(["sleep", "60"])
    tree = session_module.process_tree({stubborn.pid})
    assert set(tree) == {stubborn.pid}
    session_module.end_processes(tree, 0.2)
    assert session_module._stat(stubborn.pid) is None
    stubborn.wait()


def test_a_reused_pid_is_not_killed() -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        session_module.end_processes({bystander.pid: "1"}, 0.2)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.ray
def test_a_session_from_start_to_end() -> None:
    import ray  # imported first on purpose: the token must reach an already loaded Ray

    @ray.remote(num_cpus=1)
    def look() -> dict[str, str]:
        return dict(os.environ)

    before = set(session_module._children(os.getpid()))
    with ray_session(2, need={"CPU": 2}) as session:
        started = session_module.process_tree(set(session_module._children(os.getpid())) - before)
        folder = session.log_folder.parents[1]
        assert (folder / "token").stat().st_mode & 0o777 == 0o600
        seen = ray.get(look.remote())
        assert {name: seen[name] for name in WORKER_ENV} == WORKER_ENV
        assert seen["RAY_AUTH_MODE"] == "token"
        assert free_resources()["CPU"] <= 2
        with pytest.raises(ResourceError, match="at most"):
            require_resources({"CPU": 3})
        with pytest.raises(ResourceError, match="already open"), ray_session(2):
            pytest.fail("the block must not run")
        _assert_token_is_demanded(session.address)
    assert len(started) >= 4
    assert session_module._alive(started) == []
    assert not folder.exists()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def _assert_token_is_demanded(address: str) -> None:
    script = (
        f"from ray._raylet import GcsClient; GcsClient(address={address!r}).internal_kv_keys(b'', None, 5)"
    )
    bare = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    stranger = subprocess.run(
        [sys.executable, "-c", script],
        env=bare | {"RAY_gcs_server_request_timeout_seconds": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert stranger.returncode != 0
    assert "token" in stranger.stderr.lower()


DRIVER = textwrap.dedent(
    """
    import ray, sys, time
    from fewstep.cluster.session import ray_session
    with ray_session(1) as session:
        print(session.log_folder, flush=True)
        time.sleep(60)
    """
)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_nothing_outlives_a_signalled_driver(number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        assert driver.stdout is not None
        logs = Path(driver.stdout.readline().strip())
        started = session_module.process_tree({driver.pid})
        assert len(started) >= 5
        driver.send_signal(number)
        assert driver.wait(30) == code
    eventually(lambda: session_module._alive(started) == [] and not logs.parents[1].exists(), seconds=10)


def test_the_guard_ends_who_writes_into_the_folder_and_nobody_else(tmp_path: Path) -> None:
    log = tmp_path / "session" / "log"
    log.parent.mkdir()
    log.touch()
    with log.open("a") as file, log.open() as seen:
        writer = subprocess.Popen(["sleep", "60"], stdout=file, start_new_session=True)
        reader = subprocess.Popen(["sleep", "60"], stdin=seen)
    driver = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from fewstep.cluster.session_guard import guarded
        with guarded(Path({str(log.parent)!r})):
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    try:
        assert subprocess.run([sys.executable, "-c", driver], check=False).returncode == -signal.SIGKILL
        assert writer.wait(20) == -signal.SIGKILL
        assert reader.poll() is None
        eventually(lambda: not log.parent.exists(), seconds=10)
    finally:
        for process in (writer, reader):
            process.kill()
            process.wait()


def test_a_ray_that_does_not_start_is_one_clear_line_and_leaves_nothing() -> None:
    before = set(session_module._children(os.getpid()))
    with (
        pytest.raises(ResourceError, match="ray: got no start") as caught,
        ray_session(1, object_store_bytes=1),
    ):
        pytest.fail("the block must not run")
    assert "\n" not in str(caught.value)
    assert set(session_module._children(os.getpid())) == before


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:99999"])
def test_an_unreachable_cluster_is_one_clear_line_soon(address: str) -> None:
    started = time.monotonic()
    with pytest.raises(ResourceError, match=f"ray address {address}") as caught, ray_session(address=address):
        pytest.fail("the block must not run")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 60  # Ray alone tries for five minutes
