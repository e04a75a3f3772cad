"""A program in a process of its own: a cluster of several nodes cannot share one with the sessions of other tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def told(program: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """Runs it to its end; the JSON object that it printed, and what it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))), done.stderr
