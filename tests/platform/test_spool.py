"""The spool: what is in it after each way a process can end, and who may touch it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.platform.spool import ENTRIES, FILES, Spool, abandoned_spools

APPENDS_FOREVER = """
import sys
from pathlib import Path
from fewstep.platform.spool import Spool
spool = Spool(Path(sys.argv[1]))
number = 0
while True:
    spool.append("metrics", {"value": number})
    print(number, flush=True)
    number += 1
"""


def kinds(spool: Spool) -> list[str]:
    return [entry.kind for entry in spool.pending()]


def test_entries_come_back_in_order_and_once_acknowledged_never_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run")
    assert [spool.append("metrics", {"value": value}) for value in (0.5, float("inf"), "ä\ud800")] == [
        0,
        1,
        2,
    ]
    first, second, third = spool.pending()
    assert [entry.payload["value"] for entry in (first, second, third)] == [0.5, float("inf"), "ä\ud800"]
    spool.acknowledge(second)
    assert list(spool.pending()) == [third]
    assert spool.num_pending == 1
    assert list(spool.pending(0)) == []
    spool.close()
    again = Spool(tmp_path / "run")
    assert [entry.number for entry in again.pending()] == [2]
    assert again.append("tags", {}) == 3
    again.close()


def test_what_is_delivered_is_removed(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run")
    spool.append("metrics", {})
    spool.acknowledge(next(spool.pending()))
    spool.close()
    spool.close()
    assert not (tmp_path / "run").exists()


def test_a_file_is_kept_as_it_was_when_it_was_logged(tmp_path: Path) -> None:
    report, folder = tmp_path / "report.json", tmp_path / "model"
    report.write_text("old")
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "weights").write_text("weights")
    spool = Spool(tmp_path / "run")
    number = spool.append("artifact", {}, (report, folder))
    newer = tmp_path / "newer"
    newer.write_text("new")
    newer.replace(report)
    kept = spool.files_of(number)
    assert (kept / "report.json").read_text() == "old"
    assert (kept / "model" / "inner" / "weights").samefile(folder / "inner" / "weights"), "a copy, not a link"
    spool.acknowledge(next(spool.pending()))
    assert not (tmp_path / "run" / FILES / str(number)).exists()
    assert report.read_text() == "new"
    spool.close()


def test_a_file_that_is_not_there_is_no_entry(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        spool.append("artifact", {}, (tmp_path / "absent",))
    assert spool.num_pending == 0
    spool.close()


def test_files_are_copied_where_no_second_name_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = tmp_path / "report.json"
    source.write_text("content")
    spool = Spool(tmp_path / "run")
    number = spool.append("artifact", {}, (source,))
    assert (spool.files_of(number) / "report.json").read_text() == "content"
    spool.close()


def test_sigkill_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", APPENDS_FOREVER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 500:
                process.send_signal(signal.SIGKILL)
                break
        told = [int(line) for line in process.stdout.read().split()]
    last = max([500, *told])
    (spool,) = abandoned_spools(tmp_path)
    values = [entry.payload["value"] for entry in spool.pending()]
    assert values == list(range(len(values)))
    assert len(values) > last
    spool.close()


@pytest.mark.parametrize("tail", ["{", '{"number": 2, "kind": "metr', "x" * 200_000])
def test_half_a_line_of_a_dead_process_is_dropped(tmp_path: Path, tail: str) -> None:
    spool = Spool(tmp_path / "run")
    spool.append("params", {})
    spool.append("metrics", {"text": "y" * 100_000})
    spool.close()
    with (tmp_path / "run" / ENTRIES).open("a") as file:
        file.write(tail)
    spool = Spool(tmp_path / "run")
    assert kinds(spool) == ["params", "metrics"]
    assert spool.append("tags", {}) == 2
    assert kinds(spool) == ["params", "metrics", "tags"]
    spool.close()


def test_a_full_disk_spoils_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "run")
    spool.append("params", {})

    class Full:
        """The real file, whose disk takes ten more bytes."""

        def __init__(self, file: object) -> None:
            self._file = file
            self._left = 10

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            if not self._left:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = int(self._file.write(data[: self._left]))  # type: ignore[attr-defined]
            self._left -= written
            return written

    real = spool._file
    monkeypatch.setattr(spool, "_file", Full(real))
    with pytest.raises(OSError, match="No space left"):
        spool.append("metrics", {})
    monkeypatch.setattr(spool, "_file", real)
    spool.append("tags", {})
    assert kinds(spool) == ["params", "tags"]
    spool.close()


def test_a_live_process_s_spool_is_its_own(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "mine")
    spool.append("params", {})
    with pytest.raises(BlockingIOError):
        Spool(tmp_path / "mine")
    assert list(abandoned_spools(tmp_path)) == []
    spool.close()
    (found,) = abandoned_spools(tmp_path)
    assert found.folder.name == "mine"
    found.close()


def test_a_refused_entry_steps_aside_and_is_remembered(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run")
    spool.append("params", {"lr": "1"})
    spool.append("tags", {})
    spool.refuse(next(spool.pending()), "changed value")
    assert kinds(spool) == ["tags"]
    assert spool.refused() == ["params: changed value"]
    spool.acknowledge(next(spool.pending()))
    spool.close()
    assert json.loads((tmp_path / "run" / "refused.jsonl").read_text())["payload"] == {"lr": "1"}
