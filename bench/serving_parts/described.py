"""Requests that schemathesis makes of the server's own OpenAPI document, right ones and wrong ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy
from requests import RequestException
from schemathesis import Case, GenerationMode

TIMEOUT_S = 60.0


def send_described(url: str, model: str, count: int, seed: int) -> tuple[Counter[int], list[dict[str, Any]]]:
    """About `count` requests, as many at every operation that takes a body; the statuses, and what was a 5xx or no answer.

    Half of the bodies name the served model: an unknown name is all that is looked at otherwise.
    """
    statuses, failures = Counter[int](), list[dict[str, Any]]()

    def send(case: Case, named: bool) -> None:
        if named and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = model
        try:
            status, text = (answer := case.call(timeout=TIMEOUT_S)).status_code, answer.text
        except RequestException as error:
            status, text = 0, type(error).__name__
        statuses[status] += 1
        if status >= 500 or status == 0 or '"server_error"' in text:
            failures.append({"number": sum(statuses.values()), "kind": "described", "path": case.path, "status": status,
                             "answer": text[-300:]})  # fmt: skip

    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    with_body = [one for result in document.get_all_operations() if (one := result.ok()).body]
    share = max(1, count // (2 * len(with_body) * len(GenerationMode)))
    for operation in with_body:
        for mode in GenerationMode:
            cases = operation.as_strategy(generation_mode=mode)
            _for_each(cases, share, seed, lambda case: send(case, named=True))
            _for_each(cases, share, seed, lambda case: send(case, named=False))
    return statuses, failures


def _for_each(cases: SearchStrategy[Case], count: int, seed: int, send: Callable[[Case], None]) -> None:
    @seeded(seed)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=cases)
    def each(case: Case) -> None:
        send(case)

    each()
