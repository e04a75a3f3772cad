"""Gate 1: every trajectory is the plain loop's, for both kinds of model, every policy, cache and way to commit.

Caught here when put into the engine on purpose: a visibility or position off by one; a finished block's keys taken
from its last noisy forward; a confidence rule off (>, tempered, the wrong rank); a limit, end of sequence, fill,
edit or suffix rule off by one position or one forward; a stale page read; a draw keyed by anything else.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.actors.engine.reference.compare import assert_same, drain, result
from tests.actors.engine.reference.loop import PlainResult
from tests.actors.engine.reference.models import engine_of
from tests.actors.engine.reference.requests import draw_decisive, expected

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request

KINDS = ("block_causal", "bidirectional")
SETUPS = {
    "plain": {},
    "separate commit": {"merged_commit": False},
    "no prefix cache": {"prefix_cache": False},
    "separate commit, no prefix cache": {"merged_commit": False, "prefix_cache": False},
}


def num_committed_alone(request: Request, plain: PlainResult, engine: Engine) -> int:
    """Forwards that a separate commit adds: one for each generated block that another one follows."""
    return 0 if engine.config.attention_kind == "bidirectional" else plain.num_blocks - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setup", SETUPS)
def test_packed_and_cached_equals_the_plain_loop(kind: str, setup: str) -> None:
    requests = draw_decisive(random.Random(7), 90, kind)
    engine = engine_of(max_sequences=7, kind=kind, **SETUPS[setup])
    for request, trajectory in zip(requests, engine.generate(requests), strict=True):
        plain = expected(request, kind)
        extra = 0 if "separate" not in setup else num_committed_alone(request, plain, engine)
        assert_same(trajectory, plain, num_extra_forwards=extra)
        assert trajectory.prompt_ids.tolist() == list(request.prompt_ids)
        assert trajectory.suffix_ids.tolist() == list(request.suffix_ids)
        assert (trajectory.policy, trajectory.seed) == (request.policy, request.policy.seed)
        if request.policy.cache in ("exact", "none"):
            assert trajectory.cache_drift == 0


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
    assert any(one.num_edit_only and request.suffix_ids for request, one in zip(requests, results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_one_request_alone_equals_the_plain_loop(kind: str, rng: random.Random) -> None:
    """The same as above one at a time, so that hypothesis shrinks what differs to its smallest case."""
    (request,) = draw_decisive(rng, 1, kind)
    engine = engine_of(max_sequences=1, kind=kind)
    engine.add(request)
    assert_same(result(drain(engine), request), expected(request, kind))
