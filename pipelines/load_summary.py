"""What a load test comes to: committed tokens a second, percentiles, errors. Pure functions over what clients saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewstep.platform.rng import generator

PERCENTILES = (50, 95, 99)


@dataclass
class Sample:
    """One request as its client saw it. Times are in seconds since the start of the test.

    Attributes:
        due: when it should have been sent; sent: when it was.
        commits: arrivals of committed text; ended: the last byte.
        tokens, forwards: from `usage`; None where the server does not say.
        status: HTTP status, 0 = none came. error: what went wrong, "" = nothing.
        aborted: the client left on purpose.
    """

    due: float
    sent: float = 0.0
    commits: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int | None = None
    forwards: int | None = None
    status: int = 0
    error: str = ""
    aborted: bool = False

    @property
    def answered(self) -> bool:
        return not self.error and not self.aborted


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds of `count` arrivals of a Poisson process of `rate` a second."""
    gaps = generator(seed, "arrivals").exponential(1.0 / rate, count)
    return [float(moment) for moment in np.cumsum(gaps)]


def abort_delays(share: float, within_s: float, count: int, seed: int) -> list[float | None]:
    """For each request after how many seconds its client leaves; None = it stays."""
    draws = generator(seed, "aborts").random((count, 2))
    return [float(when) * within_s if leaves < share else None for leaves, when in draws]


def summarise(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """The report of one test.

    Times to first block count from when a request was due, so that a server that answers slowly cannot hide behind a
    client that therefore asks less often.

    Args:
        seconds: from the first request to the last answer.
    """
    answered = [sample for sample in samples if sample.answered]
    counted = [sample for sample in answered if sample.tokens is not None]
    tokens = sum(sample.tokens or 0 for sample in counted)
    forwards = sum(sample.forwards or 0 for sample in counted)
    gaps = [
        later - earlier
        for sample in answered
        for earlier, later in zip(sample.commits, sample.commits[1:], strict=False)
    ]
    errors = Counter(sample.error for sample in samples if sample.error)
    return {
        "requests": len(samples),
        "answered": len(answered),
        "aborted": sum(sample.aborted for sample in samples),
        "errors": dict(errors.most_common()),
        "errors_5xx": sum(sample.status >= 500 for sample in samples),
        "error_share": sum(errors.values()) / max(1, len(samples)),
        "seconds": seconds,
        "requests_per_s": len(answered) / seconds if seconds else 0.0,
        "committed_tokens": tokens,
        "committed_tokens_per_s": tokens / seconds if seconds else 0.0,
        "tokens_per_forward": tokens / forwards if forwards else None,
        "first_block_s": percentiles([s.commits[0] - s.due for s in answered if s.commits]),
        "block_s": percentiles(gaps),
        "request_s": percentiles([sample.ended - sample.due for sample in answered]),
        "send_lag_s": percentiles([sample.sent - sample.due for sample in samples if sample.sent]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95, p99 and mean; None of nothing."""
    if not values:
        return None
    found = {f"p{which}": float(np.percentile(values, which)) for which in PERCENTILES}
    return {**found, "mean": float(np.mean(values))}
