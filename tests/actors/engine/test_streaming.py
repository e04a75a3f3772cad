"""Gate 7: what a reader is sent, put together, is what one who waits for the end gets; nothing is taken back.

Caught here when put into the engine on purpose: text or counts sent before they are final (ahead of a mask, in a
block that may be edited, the beginning of a stop string); text sent twice after a preemption or a change of weights;
a stop string missed across two updates or inside a token.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.actors.engine.reference.compare import assert_equal, assert_same, result, run
from tests.actors.engine.reference.models import (
    BLOCK,
    CONTEXT,
    WORDS,
    engine_of,
    reference_model,
    token_bytes,
)
from tests.actors.engine.reference.requests import draw_decisive, expected

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request, Update
from fewstep.platform.records import DecodePolicy, Trajectory

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

KINDS = ("block_causal", "bidirectional")


def draw_stops(rng: random.Random, request: Request, kind: str) -> Request:
    """The request with stop strings, most of them out of the very text it would produce."""
    text = expected(request, kind).text
    stops = []
    for _ in range(rng.randint(1, 3)):
        begin = rng.randint(0, max(0, len(text) - 1))
        stops.append(text[begin : begin + rng.randint(1, 5)] or "never there")
    if rng.random() < 0.3:
        stops.append(rng.choice(WORDS[3:]) + "?")
    return dataclasses.replace(request, stop=tuple(dict.fromkeys(stops)))


def assert_text_of(engine: Engine, trajectory: Trajectory, request: Request, kind: str) -> None:
    # A trajectory does not know which other tokens ended it, or that the end of sequence was a token like others.
    if not request.stop_ids and not request.ignore_eos:
        assert engine.text_of(trajectory, request.stop) == expected(request, kind).text


def assert_adds_up(updates: list[Update], request: Request, kind: str, engine: Engine) -> None:
    """The stream of one request is its text and its count, said once each."""
    plain = expected(request, kind)
    trajectory = updates[-1].trajectory
    assert trajectory is not None
    assert [update.last for update in updates] == [False] * (len(updates) - 1) + [True]
    assert "".join(update.text for update in updates) == plain.text
    assert_text_of(engine, trajectory, request, kind)
    assert sum(update.num_new_tokens for update in updates) == trajectory.num_tokens == plain.num_tokens
    assert all(update.num_new_tokens >= 0 for update in updates)
    assert all(update.text or update.num_new_tokens or update.last for update in updates)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_the_stream_adds_up_to_the_text(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    requests = draw_decisive(rng, 4, kind)
    requests += [
        dataclasses.replace(draw_stops(rng, request, kind), request_id=f"{request.request_id} stops")
        for request in requests
    ]
    memory = rng.choice([None, int(1.5 * CONTEXT * token_bytes(reference_model(kind).config))])
    setup = {
        "memory_bytes": memory,
        "max_rows": rng.choice([None, BLOCK]),
        "merged_commit": rng.random() < 0.5,
    }
    engine = engine_of(max_sequences=rng.randint(1, 6), kind=kind, **setup)
    for name, updates in run(engine, requests).items():
        request = next(one for one in requests if one.request_id == name)
        assert_same(result({name: updates}, request), expected(request, kind), num_extra_forwards=None)
        assert_adds_up(updates, request, kind, engine)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_and_whole_are_one_trajectory(kind: str) -> None:
    rng = random.Random(11)
    requests = draw_decisive(rng, 30, kind)
    requests += [
        dataclasses.replace(draw_stops(rng, request, kind), request_id=f"{request.request_id} stops")
        for request in requests
    ]
    streaming, whole = engine_of(max_sequences=4, kind=kind), engine_of(max_sequences=4, kind=kind)
    updates = run(streaming, requests)
    assert max(len(of_one) for of_one in updates.values()) > 3
    inside = stopped = 0
    for trajectory, request in zip(whole.generate(requests), requests, strict=True):
        assert_equal(result(updates, request), trajectory)
        assert_text_of(whole, trajectory, request, kind)
        words = "".join(WORDS[token] for token in trajectory.completion_ids if token > 2)
        inside += words != expected(request, kind).text
        stopped += trajectory.finish_reason == "stop" and trajectory.completion_ids[-1:].tolist() != [1]
    assert stopped > 10
    assert inside, "no stop string began inside a token, so that cut went untested"


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_as_soon_as_it_is_final(kind: str) -> None:
    """Left-to-right order writes one token a step; without editing each is sent by the step that wrote it."""
    policy = DecodePolicy(
        kind="static", tokens_per_step=1, **({"block_size": 1} if kind == "bidirectional" else {})
    )
    request = Request("a", (3, 4, 5), policy, max_tokens=13, ignore_eos=True)
    engine = engine_of(kind=kind)
    engine.add(request)
    final = 0
    canvas = [*expected(request, kind).states[1:], expected(request, kind).canvas]
    for state in canvas:
        now = next((i for i, token in enumerate(state) if token == 0), len(state))
        sent = sum(update.num_new_tokens for update in engine.step())
        assert sent == min(now, 13) - final
        final = min(now, 13)
    assert not engine.has_work


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_block_is_sent_while_it_may_be_edited(kind: str) -> None:
    policy = DecodePolicy(threshold=0.3, edit_threshold=0.2, max_edit_steps=8)
    sent_early = edited = 0
    for seed in range(12):
        request = Request("a", (3 + seed, 4, 5), policy, max_tokens=21, ignore_eos=True)
        if not expected(request, kind).decisive:
            continue
        engine = engine_of(kind=kind)
        updates = run(engine, [request])["a"]
        assert "".join(update.text for update in updates) == expected(request, kind).text
        edited += len(expected(request, kind).edits)
        # Three blocks: no more than three updates, each a whole block.
        assert (
            len([update for update in updates if update.num_new_tokens]) <= expected(request, kind).num_blocks
        )
        sent_early += len(updates) > 1
    assert edited > 10
    assert sent_early > 3
