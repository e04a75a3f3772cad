"""Waiting in a test for what another process or thread brings about."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Asks again and again; fails where the answer is still no after so long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
