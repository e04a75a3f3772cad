"""Whether the cluster has room: asked before actors start, because Ray would let them wait without a word."""

from __future__ import annotations

import importlib
import time
from typing import Any

from fewstep.platform.errors import ResourceError

_PATIENCE_S = 30.0
_POLL_S = 0.2
_ROUNDING = 1e-9  # fractions such as 0.4 add up inexactly


def require_room(what: str, count: int, num_cpus: float) -> None:
    """Refuse at once what the cluster never has; wait a little for what ended actors still hold.

    Args:
        what: the actors' name in the message, such as `replicas`.
        count: how many; num_cpus: logical CPUs of each.
    Raises:
        ResourceError: says how many CPUs are free.
    """
    ray: Any = importlib.import_module("ray")  # late: only a job that has a session imports it
    asked = count * num_cpus
    patience_s = _PATIENCE_S if asked <= ray.cluster_resources().get("CPU", 0.0) + _ROUNDING else 0.0
    deadline = time.monotonic() + patience_s
    while asked > (free := float(ray.available_resources().get("CPU", 0.0))) + _ROUNDING:
        if time.monotonic() >= deadline:
            raise ResourceError(
                what,
                f"{count} x {num_cpus:g} CPU",
                f"at most {free:g} CPU (free on the cluster)",
                f"ask for fewer {what} or give the session more CPUs",
            )
        time.sleep(_POLL_S)
