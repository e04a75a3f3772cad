"""Whole or not at all: after any error the old content stands and nothing is left beside it."""

from __future__ import annotations

import errno
import hashlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from fewstep.platform import artifacts
from fewstep.platform.errors import ResourceError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted_after_writing(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def test_write_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    artifacts.atomic_write_text(path, "ä")
    artifacts.atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["report.json"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), artifacts.atomic_file(path) as temporary:
        interrupted_after_writing(temporary)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_folder_appears_whole_and_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for generation in ("one", "two"):
        with artifacts.atomic_folder(target) as temporary:
            (temporary / "nested").mkdir()
            (temporary / "nested" / generation).write_text(generation)
            assert not (target / "nested" / generation).exists()
        assert names(target / "nested") == [generation]
    assert names(tmp_path) == ["model"]


def test_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), artifacts.atomic_folder(target) as temporary:
        interrupted_after_writing(temporary / "weights")
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["enospc", "quota", "rust"],
)
def test_full_disk_is_a_resource_error_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    for context in (artifacts.atomic_file, artifacts.atomic_folder):
        with pytest.raises(ResourceError, match="free some space"), context(tmp_path / "model"):
            raise error
    assert names(tmp_path) == []


def test_really_full_device() -> None:
    with pytest.raises(ResourceError, match="full disk"), artifacts.atomic_file(Path("/dev/shm/absent")):
        Path("/dev/full").write_bytes(b"x" * 1_000_000)


def test_digest_is_sha256_of_the_content(tmp_path: Path) -> None:
    data = b"fewstep" * 100_000
    (tmp_path / "data").write_bytes(data)
    assert artifacts.file_digest(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_commit_names_the_checkout_and_its_dirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(artifacts, "_CHECKOUT", tmp_path.resolve())
    assert artifacts.git_commit() == "unknown"
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    # What a git hook exports must not redirect the question.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert artifacts.git_commit() == head
    (tmp_path / "file").write_text("2")
    assert artifacts.git_commit() == f"{head}+dirty"
    # A package inside somebody else's repository is not that repository.
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(artifacts, "_CHECKOUT", (tmp_path / "inner").resolve())
    assert artifacts.git_commit() == "unknown"


def test_machine_is_described() -> None:
    info = artifacts.machine_info()
    assert set(info) == {"cpu", "cores", "memory_bytes", "system", "python"}
    assert isinstance(info["cores"], int)
    assert info["cores"] >= 1
    assert isinstance(info["memory_bytes"], int)
    assert info["memory_bytes"] > 100 * 2**20
    assert info["cpu"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_that_is_replaced_holds_the_new_content_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:  # as on a file system that cannot
        monkeypatch.setattr(artifacts, "_exchange", lambda one, two: False)
    target = tmp_path / "checkpoint"
    for number in range(3):
        with artifacts.atomic_folder(target) as temporary:
            (temporary / "step").write_text(str(number))
        assert (target / "step").read_text() == str(number)
        assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_replaced_is_never_missing(tmp_path: Path) -> None:
    """A driver that is killed in the middle would find no checkpoint to go on from."""
    target, stop, missing = tmp_path / "checkpoint", threading.Event(), []
    target.mkdir()

    def look() -> None:
        while not stop.is_set():
            if not target.is_dir():
                missing.append(time.monotonic())

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for _ in range(300):
            with artifacts.atomic_folder(target):
                pass
    finally:
        stop.set()
        reader.join()
    assert missing == []


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from fewstep.platform.artifacts import atomic_file, atomic_folder
        out = Path({str(tmp_path)!r})
        with atomic_folder(out / "models" / "step") as folder, atomic_file(out / "report.json") as file:
            (folder / "weights").write_text("half")
            file.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (tmp_path / ".hidden").touch()
    with artifacts.atomic_folder(tmp_path / "mine") as unfinished:
        assert len(list(tmp_path.rglob(".*"))) == 4
        artifacts.remove_unfinished(tmp_path)
        assert set(tmp_path.rglob(".*")) == {tmp_path / ".hidden", unfinished}
