"""The replicas' processes and what they say of themselves, seen from the command that started them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families


def replica_processes() -> list[psutil.Process]:
    """Processes of this command's replicas, by the title Ray Serve gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ServeReplica"):
                found.append(process)
        except psutil.Error:
            continue  # ended between the listing and the look
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def left_behind(url: str) -> dict[str, float]:
    """What is in use on an idle server and should not be, summed over replicas: answers, waiting ones, pages, requests."""

    def look() -> dict[str, float]:
        text = httpx.get(f"{url}/metrics", timeout=30).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

        def total(name: str, **labels: str) -> float:
            return sum(
                sample.value
                for sample in samples
                if sample.name == name and labels.items() <= sample.labels.items()
            )

        return {
            "running": total("fewstep_running"),
            "waiting": total("fewstep_waiting"),
            "pages": total("fewstep_pages", state="used"),
            # The scrape itself is a request.
            "requests": total("fewstep_requests_in_flight") - 1,
        }

    found: dict[str, Any] = {}

    def nothing() -> bool:
        found.update(look())
        return not any(found.values())

    wait_until(nothing, 30.0)
    return found
