"""Finished comparisons on disk, one JSON line each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Store:
    """Entries of one set of settings and one commit; a second entry of a key replaces the first.

    Args:
        path: the file; keys that belong to other settings or commits stay in it and are not seen.
        stamp: names settings and commit.
        resume: whether entries already there count; failed ones do not, so that they are tried again.
    """

    def __init__(self, path: Path, stamp: str, resume: bool) -> None:
        self.path, self.stamp = path, stamp
        self._entries: dict[str, Entry] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.is_file():
            for entry in _read(path):
                if entry["stamp"] == stamp and "error" not in entry["value"]:
                    self._entries[entry["key"]] = entry["value"]
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")  # ends the line that a killed run was writing
        elif path.is_file():
            path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def put(self, key: str, value: Entry) -> None:
        """Keep an entry; it is on disk when this returns."""
        self._entries[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stamp": self.stamp, "key": key, "value": value}) + "\n")

    def values(self, prefix: str) -> list[Entry]:
        """Entries whose key begins with `prefix`, in the order they were made."""
        return [value for key, value in self._entries.items() if key.startswith(prefix)]


def _read(path: Path) -> Iterator[Entry]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # empty, or what a killed run was writing
