"""Gate 1: every trajectory is the plain loop's, for both kinds of model, every policy, cache and way to commit.

Caught here when put into the engine on purpose: a visibility or position off by one; a finished block's keys taken
from its last noisy forward; a confidence rule off (>, tempered, the wrong rank); a limit, end of sequence, fill,
edit or suffix rule off by one position or one forward; a stale page read; a draw keyed by anything else.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.actors.engine.reference.compare import assert_same, drain, result
from tests.actors.engine.reference.models import BLOCK, engine_of
from tests.actors.engine.reference.requests import draw_decisive, expected

from fewstep.actors.engine import cache
from fewstep.actors.engine.request import Request
from fewstep.kernels.attention import gathered
from fewstep.kernels.head import tiled

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

KINDS = ("block_causal", "bidirectional")
SETUPS = {
    "plain": {},
    "separate commit": {"merged_commit": False},
    "no prefix cache": {"prefix_cache": False},
    "separate commit, no prefix cache": {"merged_commit": False, "prefix_cache": False},
}


def num_forwards_that_only_commit(request: Request, kind: str) -> int:
    """Of a separate commit: one for the prompt's whole blocks, one for each generated block that another follows."""
    if kind == "bidirectional" or request.policy.cache == "none":
        return 0
    return (len(request.prompt_ids) >= BLOCK) + expected(request, kind).num_blocks - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setup", SETUPS)
def test_packed_and_cached_equals_the_plain_loop(kind: str, setup: str) -> None:
    requests = draw_decisive(random.Random(7), 90, kind)
    engine = engine_of(max_sequences=7, kind=kind, **SETUPS[setup])
    for request, trajectory in zip(requests, engine.generate(requests), strict=True):
        extra = num_forwards_that_only_commit(request, kind) if "separate" in setup else 0
        assert_same(trajectory, expected(request, kind), num_extra_forwards=extra)
        assert trajectory.prompt_ids.tolist() == list(request.prompt_ids)
        assert trajectory.suffix_ids.tolist() == list(request.suffix_ids)
        assert (trajectory.policy, trajectory.seed) == (request.policy, request.policy.seed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ways_of_large_models_and_batches_equal_the_plain_loop(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head in tiles, attention in many calls, nothing gathered kept: what sizes this small would not choose."""
    monkeypatch.setattr(tiled, "MIN_VOCABULARY", 0)
    monkeypatch.setattr(tiled, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(tiled, "TILE", 6)
    monkeypatch.setattr(tiled, "_PART", 3)  # parts divide tiles
    monkeypatch.setattr(gathered, "_SPLIT_WORK", 0)
    monkeypatch.setattr(cache, "_MAX_KEPT_BYTES", 0)
    requests = draw_decisive(random.Random(7), 40, kind)
    # Among themselves, and beside requests that draw.
    greedy = [request for request in requests if request.policy.temperature == 0]
    assert len(greedy) > 10
    for some in (greedy, requests):
        engine = engine_of(max_sequences=5, kind=kind)
        for request, trajectory in zip(some, engine.generate(some), strict=True):
            assert_same(trajectory, expected(request, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_covers_every_rule(kind: str) -> None:
    requests = draw_decisive(random.Random(7), 90, kind)
    results = [expected(request, kind) for request in requests]
    assert {one.finish_reason for one in results} == {"stop", "length"}
    assert {request.policy.kind for request in requests} == {
        "threshold", "static", "entropy_bound", "factor",
    }  # fmt: skip
    caches = {"exact", "none"} | ({"prefix", "dual"} if kind == "bidirectional" else set())
    assert {request.policy.cache for request in requests} == caches
    assert sum(request.policy.temperature > 0 for request in requests) > 20
    assert sum(request.policy.temperature > 0 and request.policy.top_p < 1 for request in requests) > 5
    assert sum(bool(one.edits) for one in results) > 15
    assert sum(bool(request.suffix_ids) for request in requests) > 8
    assert sum(one.num_blocks > 2 for one in results) > 15
    assert (sum(one.cache_drift > 0.01 for one in results) > 10) == (kind == "bidirectional")
    assert any(
        one.num_edit_only and request.suffix_ids for request, one in zip(requests, results, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_one_request_alone_equals_the_plain_loop(kind: str, seed: int) -> None:
    """The same one at a time: what differs here owes nothing to company."""
    (request,) = draw_decisive(random.Random(seed), 1, kind)
    engine = engine_of(max_sequences=1, kind=kind)
    engine.add(request)
    assert_same(result(drain(engine), request), expected(request, kind))
