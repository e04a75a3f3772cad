"""API keys: a file of salted hashes, found by the identifier that every key begins with, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import time
from pathlib import Path

from pydantic import Field, ValidationError

from fewstep.platform.artifacts import atomic_file
from fewstep.platform.config import Config
from fewstep.platform.errors import ConfigError

logger = logging.getLogger(__name__)

_PREFIX = "fs"
_RELOAD_S = 2.0
# What an unknown identifier is compared with, so that it takes as long as a known one.
_NOBODY = "0" * 64


class KeyEntry(Config):
    """One key, without the key.

    Attributes:
        id: the part of the key that is no secret.
        sha256: of salt and secret. A secret is 256 random bits, so a slow hash would protect nothing and let anyone
            keep the server busy with wrong keys.
    """

    name: str = Field(min_length=1)
    """Who; in logs, never in metrics."""
    id: str = Field(pattern="^[0-9a-f]{12}$")
    salt: str = Field(pattern="^[0-9a-f]{32}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    weight: float = Field(default=1.0, gt=0.0)
    """Share of a busy server relative to other keys."""
    requests_per_minute: float | None = Field(default=None, gt=0.0)
    tokens_per_minute: float | None = Field(default=None, gt=0.0)
    seconds_per_minute: float | None = Field(default=None, gt=0.0)
    """Budgets of this key; null = the server's default."""


class KeyFile(Config):
    """What the file holds."""

    keys: tuple[KeyEntry, ...] = ()


def make_key(name: str, weight: float = 1.0) -> tuple[str, KeyEntry]:
    """A new key, which is shown once, and its entry for the file."""
    identifier, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_hex(16)
    entry = KeyEntry(name=name, id=identifier, salt=salt, sha256=_hash(salt, secret), weight=weight)
    return f"{_PREFIX}-{identifier}-{secret}", entry


def read_keys(path: Path) -> list[KeyEntry]:
    """The entries of a file of keys.

    Raises:
        ConfigError: it cannot be read, or an entry is wrong.
    """
    try:
        entries = list(KeyFile.model_validate(json.loads(path.read_text(encoding="utf-8"))).keys)
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        got = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise ConfigError(str(path), got, "a file of keys", "make one with `fewstep key NAME`") from error
    for what in ("id", "name"):
        values = [getattr(entry, what) for entry in entries]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError(str(path), f"{what} {twice[0]!r} twice", "one entry each", "remove one")
    return entries


def write_keys(path: Path, entries: list[KeyEntry]) -> None:
    """Replace the file; only its owner may read it."""
    with atomic_file(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(KeyFile(keys=tuple(entries)).model_dump_json(indent=2) + "\n", encoding="utf-8")


class KeyRing:
    """The keys of a file, read again when the file changes: a key can be added or taken away while serving.

    Raises:
        ConfigError: the file is not one of keys.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = {entry.id: entry for entry in read_keys(path)}
        self._stamp, self._looked = path.stat().st_mtime_ns, time.monotonic()

    def find(self, key: str) -> KeyEntry | None:
        """The entry of a key, or None."""
        self._reload()
        prefix, _, rest = key.partition("-")
        identifier, _, secret = rest.partition("-")
        entry = self._entries.get(identifier)
        expected = entry.sha256 if entry is not None else _NOBODY
        right = hmac.compare_digest(_hash(entry.salt if entry is not None else "", secret), expected)
        return entry if right and prefix == _PREFIX else None

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._looked < _RELOAD_S:
            return
        self._looked = now
        try:
            stamp = self._path.stat().st_mtime_ns
            if stamp != self._stamp:
                self._stamp = stamp
                self._entries = {entry.id: entry for entry in read_keys(self._path)}
        except (OSError, ConfigError) as error:
            # A file that is being repaired must not lock everybody out.
            logger.error("keys stay as they were: %s", error)


def _hash(salt: str, secret: str) -> str:
    return hashlib.sha256(f"{salt}:{secret}".encode()).hexdigest()
