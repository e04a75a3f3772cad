"""Trajectories against the plain loop and against each other, and the ways to drive an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
from tests.actors.engine.reference.loop import PlainResult

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request, Update
from fewstep.platform.records import Trajectory

# Log-probabilities: another batch shape rounds differently (2.3e-5 at most in 1,000 requests); what is wrong differs by
# 1e-3 and more.
TOLERANCE = 1e-4

Edits = list[tuple[int, int, int, float]]


def edits_of(trajectory: Trajectory) -> Edits:
    columns = (
        trajectory.edit_position,
        trajectory.edit_step,
        trajectory.edit_token,
        trajectory.edit_logprob,
    )
    return list(zip(*(column.tolist() for column in columns), strict=True))


def assert_same_edits(edits: Edits, expected: Edits) -> None:
    # A position is written once a step, so (position, step) orders edits whatever order they are listed in.
    edits, expected = sorted(edits, key=lambda e: e[:2]), sorted(expected, key=lambda e: e[:2])
    assert [e[:3] for e in edits] == [e[:3] for e in expected]
    np.testing.assert_allclose(
        [e[3] for e in edits], [e[3] for e in expected], atol=TOLERANCE, equal_nan=True
    )


def assert_same(trajectory: Trajectory, plain: PlainResult, *, num_extra_forwards: int | None = 0) -> None:
    """Everything a trajectory records is what the plain loop did.

    Args:
        num_extra_forwards: forwards that decided nothing (prompt chunks, separate commits); None = any number.
    """
    assert trajectory.canvas_ids.tolist() == plain.canvas
    assert trajectory.step_map.tolist() == plain.step_map
    assert trajectory.num_tokens == plain.num_tokens
    assert trajectory.finish_reason == plain.finish_reason
    assert trajectory.forwards >= plain.forwards
    if num_extra_forwards is not None:
        assert trajectory.forwards == plain.forwards + num_extra_forwards
    np.testing.assert_allclose(trajectory.logprob, plain.logprob, atol=TOLERANCE, equal_nan=True)
    np.testing.assert_allclose(trajectory.confidence, np.exp(trajectory.logprob), rtol=1e-5, equal_nan=True)
    assert_same_edits(edits_of(trajectory), plain.edits)
    np.testing.assert_allclose(trajectory.cache_drift, plain.cache_drift, atol=TOLERANCE)
    # What carries no number is what nobody chose: unwritten, or filled behind an end of sequence.
    assert (np.isnan(trajectory.logprob) == np.isnan(trajectory.confidence)).all()


def assert_equal(one: Trajectory, other: Trajectory, *, forwards: bool = True) -> None:
    """Two trajectories of one request; `forwards=False` where their set-ups chunk or commit differently."""
    assert one.canvas_ids.tolist() == other.canvas_ids.tolist()
    assert one.step_map.tolist() == other.step_map.tolist()
    assert (one.num_tokens, one.finish_reason) == (other.num_tokens, other.finish_reason)
    assert one.prompt_ids.tolist() == other.prompt_ids.tolist()
    assert one.suffix_ids.tolist() == other.suffix_ids.tolist()
    if forwards:
        assert one.forwards == other.forwards
    np.testing.assert_allclose(one.logprob, other.logprob, atol=TOLERANCE, equal_nan=True)
    assert_same_edits(edits_of(one), edits_of(other))


def drain(engine: Engine, updates: dict[str, list[Update]] | None = None) -> dict[str, list[Update]]:
    """Step until nothing is left; updates by request, in order."""
    updates = {} if updates is None else updates
    while engine.has_work:
        note(updates, engine.step())
    return updates


def note(updates: dict[str, list[Update]], new: Iterable[Update]) -> None:
    for update in new:
        updates.setdefault(update.request_id, []).append(update)


def run(engine: Engine, requests: list[Request]) -> dict[str, list[Update]]:
    for request in requests:
        engine.add(request)
    return drain(engine)


def result(updates: dict[str, list[Update]], request: Request) -> Trajectory:
    last = updates[request.request_id][-1]
    assert last.trajectory is not None, last.error
    return last.trajectory


def assert_idle_and_whole(engine: Engine, max_sequences: int) -> None:
    """Nothing runs, waits or holds a slot, and every page is free or held by the prefix cache alone."""
    stats = engine.stats()
    assert not engine.has_work
    assert (stats["num_running"], stats["num_waiting"], stats["slots_free"]) == (0, 0, max_sequences)
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
    engine.clear_prefix_cache()
    stats = engine.stats()
    assert (stats["pages_free"], stats["pages_cached"]) == (stats["pages_total"], 0)


@contextlib.contextmanager
def whole_afterwards(engine: Engine, max_sequences: int) -> Iterator[Engine]:
    yield engine
    assert_idle_and_whole(engine, max_sequences)
