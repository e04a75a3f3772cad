"""How much work an engine has left, in forwards and seconds: what scaling and routing go by. Pure functions.

The number of open requests says little of a diffusion model's load: one asks for eight tokens and another for a thousand,
and a forward commits one token of a hard text and six of an easy one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Load:
    """What is before a replica.

    Attributes:
        rows_running: requests that its engines denoise together; rows_waiting: those that wait, wherever.
        masks_left: tokens that they will still have written, all together.
        forwards_left: of a full batch, until those are written; seconds_left: what these take.
        request_s: seconds that one more request of the usual length would add.
    """

    rows_running: float = 0.0
    rows_waiting: float = 0.0
    masks_left: float = 0.0
    forwards_left: float = 0.0
    seconds_left: float = 0.0
    request_s: float = 0.0

    def as_stats(self) -> dict[str, float]:
        """By name, as Ray Serve carries it."""
        return asdict(self)


def load_of(measures: Mapping[str, float], num_queued: int = 0) -> Load:
    """The load of one engine.

    A request may write `max_tokens` and mostly ends before; so what is left is the masks left times the share of their
    allowance that answers used lately. The batch is taken to be full, since one that is not takes newcomers at no cost:
    an engine with one request of the 64 that it could denoise is nearly idle. An engine that has not stepped yet has
    0 seconds left.

    Args:
        measures: `EngineHost.measures`; num_queued: requests that wait in front of the engine.
    """
    share = measures["answer_share"] or 1.0
    masks = share * (measures["masks_running"] + measures["masks_waiting"])
    rows = measures["num_running"] + measures["num_waiting"]
    usual = measures["answer_tokens"] or masks / max(1.0, rows)
    masks += usual * num_queued
    # The tokens that a full batch commits in a forward.
    pace = (measures["tokens_per_forward"] or 1.0) * max(1.0, measures["num_slots"])
    step_s = measures["step_s"]
    return Load(
        rows_running=measures["num_running"],
        rows_waiting=measures["num_waiting"] + num_queued,
        masks_left=masks,
        forwards_left=masks / pace,
        seconds_left=masks / pace * step_s,
        request_s=usual / pace * step_s,
    )


def together(loads: Iterable[Load]) -> Load:
    """The load of a replica with several engines, which take turns on the same cores."""
    found = list(loads)
    sums = {name: math.fsum(load.as_stats()[name] for load in found) for name in Load().as_stats()}
    return Load(**(sums | {"request_s": max((load.request_s for load in found), default=0.0)}))


def wanted_replicas(seconds_left: Sequence[float], backlog_s: float) -> int:
    """Replicas among which the work is done in `backlog_s` seconds; at least one.

    Args:
        seconds_left: of each replica there is.
    """
    return max(1, math.ceil(math.fsum(seconds_left) / backlog_s - 1e-9))
