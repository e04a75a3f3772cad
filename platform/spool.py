"""What a run has logged and its store has not taken yet: an append-only file of one line per entry.

    SPOOL/entries.jsonl   every entry, in order; appended to, never rewritten
    SPOOL/delivered       how many bytes of it the store has taken; replaced whole
    SPOOL/refused.jsonl   entries that the store will never take, each with its reason
    SPOOL/files/N/        what entry N uploads, as hard links
    SPOOL/lock            held by the process that may write or deliver; the kernel lets go of it with the process

An entry is in the file when `append` returns, so a SIGKILL of the process loses none, and `sync` makes that hold for
a power cut as well. Between the store's taking an entry and the note that it did lies a moment in which a process
can die: entries are delivered at least once, and whoever delivers them must make twice the same as once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.platform.artifacts import atomic_write_text

_CHUNK_BYTES = 1 << 16
ENTRIES, DELIVERED, REFUSED, FILES, LOCK = "entries.jsonl", "delivered", "refused.jsonl", "files", "lock"


@dataclass(frozen=True)
class Entry:
    """One thing to tell the store.

    Attributes:
        number: its place in the spool, from 0.
        kind: which thing; delivery knows the kinds.
        payload: JSON.
        end: byte offset behind its line.
    """

    number: int
    kind: str
    payload: dict[str, Any]
    end: int


class Spool:
    """One folder of entries, open for its only writer and deliverer.

    Args:
        folder: made when missing.
    Raises:
        BlockingIOError: another live process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = (self.folder / LOCK).open("a")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise
        self._mutex = threading.Lock()
        self._repair()
        self._file = (self.folder / ENTRIES).open("ab", buffering=0)
        self._delivered, self._num_delivered = self._read_delivered()
        self._num_entries = self._num_delivered + sum(1 for _ in self.pending())
        self._synced = 0

    @property
    def num_pending(self) -> int:
        """Entries that are neither delivered nor refused."""
        with self._mutex:
            return self._num_entries - self._num_delivered

    def append(self, kind: str, payload: dict[str, Any], files: tuple[Path, ...] = ()) -> int:
        """Adds an entry; any thread. Returns its number.

        Args:
            kind, payload: what `Entry` says.
            files: files or folders that belong to it. Linked, not copied: a later replacement of such a file does not
                change what is delivered, but writing into it in place would.
        Raises:
            FileNotFoundError: one of `files` is not there.
            OSError: the disk is full.
        """
        with self._mutex:
            number = self._num_entries
            for path in files:
                _link(Path(path), self.files_of(number) / Path(path).name)
            line = json.dumps({"number": number, "kind": kind, "payload": payload})
            self._write(line.encode("ascii") + b"\n")
            self._num_entries += 1
            return number

    def files_of(self, number: int) -> Path:
        """Where the files of an entry are."""
        return self.folder / FILES / str(number)

    def sync(self) -> None:
        """Returns when everything appended so far is on the disk itself."""
        end = os.fstat(self._file.fileno()).st_size
        if end > self._synced:
            os.fsync(self._file.fileno())
            self._synced = end

    def pending(self, limit: int | None = None) -> Iterator[Entry]:
        """The oldest entries that are not done, in order, read from the file."""
        with (self.folder / ENTRIES).open("rb") as file:
            file.seek(self._delivered)
            while limit is None or limit > 0:
                line = file.readline()
                if not line.endswith(b"\n"):
                    return
                content = json.loads(line)
                yield Entry(content["number"], content["kind"], content["payload"], file.tell())
                limit = None if limit is None else limit - 1

    def acknowledge(self, entry: Entry) -> None:
        """Notes that the store has this entry and all before it, and drops their files."""
        with self._mutex:
            first, self._num_delivered, self._delivered = self._num_delivered, entry.number + 1, entry.end
        atomic_write_text(self.folder / DELIVERED, json.dumps([self._delivered, self._num_delivered]))
        for number in range(first, self._num_delivered):
            shutil.rmtree(self.files_of(number), ignore_errors=True)

    def refuse(self, entry: Entry, reason: str) -> None:
        """Puts aside an entry that the store will never take, so that those behind it get through."""
        with (self.folder / REFUSED).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({"kind": entry.kind, "payload": entry.payload, "reason": reason}) + "\n")
        self.acknowledge(entry)

    def refused(self) -> list[str]:
        """Why entries were refused, oldest first."""
        path = self.folder / REFUSED
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines]
        return [f"{row['kind']}: {row['reason']}" for row in rows]

    def close(self) -> None:
        """Lets go of the folder, and removes it when nothing in it is left to do. A second call does nothing."""
        if self._file.closed:
            return
        self.sync()
        self._file.close()
        if not self.num_pending and not (self.folder / REFUSED).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_file.close()

    def _write(self, line: bytes) -> None:
        start = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            os.truncate(self._file.fileno(), start)  # half a line would spoil the next one
            raise

    def _read_delivered(self) -> tuple[int, int]:
        path = self.folder / DELIVERED
        if not path.is_file():
            return 0, 0
        offset, number = json.loads(path.read_text())
        return int(offset), int(number)

    def _repair(self) -> None:
        """Drops half a line at the end, which only a process that died while it wrote can leave."""
        path = self.folder / ENTRIES
        if not path.is_file():
            return
        with path.open("r+b") as file:
            end = whole = file.seek(0, os.SEEK_END)
            while whole > 0:
                start = max(0, whole - _CHUNK_BYTES)
                file.seek(start)
                newline = file.read(whole - start).rfind(b"\n")
                whole = start + newline + 1
                if newline >= 0:
                    break
            if whole < end:
                file.truncate(whole)


def abandoned_spools(root: Path) -> Iterator[Spool]:
    """The spools under `root` that no live process holds and that have something to deliver, each opened; close them."""
    # Not by the lock file: a process that has just made its folder may not hold the lock yet.
    for entries in sorted(Path(root).glob(f"*/{ENTRIES}")):
        try:
            spool = Spool(entries.parent)
        except (BlockingIOError, FileNotFoundError):
            continue  # its process lives, or has just removed it
        if spool.num_pending:
            yield spool
        else:
            spool.close()


def _link(source: Path, target: Path) -> None:
    """A second name for a file or a folder's files; a copy where the file system has no second names."""
    if source.is_dir():
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            _link(file, target / file.relative_to(source))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
