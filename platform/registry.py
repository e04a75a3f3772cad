"""Plug-ins: a short name or a dotted path `package.module:attribute`, resolved late."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from fewstep.platform.errors import ConfigError


def nearest(name: str, choices: list[str]) -> str:
    """` (did you mean X?)` or an empty string."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def resolve(field: str, name: str, known: Mapping[str, str]) -> Any:
    """The object behind a plug-in name.

    Args:
        field: the configuration key it came from, for the message.
        name: a key of `known`, or a dotted path `package.module:attribute`.
        known: short name to dotted path.
    Raises:
        ConfigError: neither a known name nor an importable path.
    """
    path = known.get(name, name)
    if ":" not in path:
        raise ConfigError(
            field,
            repr(name),
            f"{sorted(known)} or package.module:attribute",
            "use one of them" + nearest(name, list(known)),
        )
    module, attribute = path.split(":", 1)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            field, repr(name), "an importable package.module:attribute", f"check the path ({error})"
        ) from error
