"""How one sampled answer came to be, as spans: what a job knows of it, free of MLflow."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Stages that a batch of answers goes through.
GENERATE, EXTRACT, VERIFY, CREDIT = "generate", "extract", "verify", "credit"


@dataclass(frozen=True)
class Span:
    """One stage of an answer.

    Attributes:
        name: rollout, extraction, sandbox or reward.
        start_ns, end_ns: nanoseconds since the epoch.
        inputs, outputs: JSON, shown beside the span.
        attributes: numbers and words about it.
        failed: the stage says that the answer is wrong.
    """

    name: str
    start_ns: int
    end_ns: int
    inputs: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True)
class RolloutTrace:
    """The stages of one answer in order, and what came of it.

    Attributes:
        request, response: the prompt and the answer, shown in lists.
        spans: the stages; the trace reaches from the first start to the last end.
        tags: for search, such as step and prompt.
        feedback: verdicts shown as the trace's assessments.
        trace_id: 32 hexadecimal digits.
    """

    request: str
    response: str
    spans: tuple[Span, ...]
    tags: Mapping[str, str] = field(default_factory=dict)
    feedback: Mapping[str, bool | float | str] = field(default_factory=dict)
    trace_id: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(frozen=True)
class Window:
    """When a stage of a whole batch began and ended, in nanoseconds since the epoch."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


class Clock:
    """Stages, one after the other without a gap."""

    def __init__(self) -> None:
        self._last = time.time_ns()
        self.windows: dict[str, Window] = {}

    def lap(self, name: str) -> None:
        """Everything since the last lap was this stage."""
        now = time.time_ns()
        self.windows[name] = Window(self._last, now)
        self._last = now
