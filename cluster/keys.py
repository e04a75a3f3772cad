"""`fewstep key NAME`: a new API key. It is printed once; the file keeps a salted hash of it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fewstep.platform.config import Config
from fewstep.platform.errors import ConfigError


class KeyConfig(Config):
    """For whom, and into which file."""

    name: str = ""
    """Who gets the key; appears in the server's log."""
    file: Path = Path("keys.json")
    """The file of keys that `fewstep serve --keys` reads; made when it is not there."""
    weight: float = Field(default=1.0, gt=0.0)
    """Share of a busy server relative to other keys."""
    remove: bool = False
    """Take the key of this name out of the file instead; a running server follows within seconds."""


def run(config: KeyConfig) -> None:
    """Add or remove one key.

    Raises:
        ConfigError: no name, a name that is taken or not there, or a file that is not one of keys.
    """
    from fewstep.actors.serving.keys import make_key, read_keys, write_keys

    if not config.name:
        raise ConfigError("name", "nothing", "who gets the key", "write `fewstep key NAME`")
    entries = read_keys(config.file) if config.file.exists() or config.remove else []
    names = [entry.name for entry in entries]
    if config.remove:
        if config.name not in names:
            raise ConfigError(
                "name", repr(config.name), ", ".join(names) or "no keys yet", "name one of them"
            )
        write_keys(config.file, [entry for entry in entries if entry.name != config.name])
        return
    if config.name in names:
        raise ConfigError(
            "name", repr(config.name), "a name without a key", "take another or remove the old key first"
        )
    key, entry = make_key(config.name, config.weight)
    write_keys(config.file, [*entries, entry])
    print(key)
