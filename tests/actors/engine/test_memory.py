"""Gate 5: whatever ends a request, and whenever, slots and pages come back; too little memory costs time only.

Caught here when put into the engine on purpose: a page or slot not freed by an abort (waiting, in its prompt's
chunks, mid-block, between blocks, editing, preempted, ended), a failure or a stop; one freed twice; a preempted
request that loses a token, draws anew or keeps its pages.
"""

from __future__ import annotations

import dataclasses
import functools
import random

import numpy as np
import pytest
from tests.actors.engine.reference.compare import (
    TOLERANCE,
    assert_idle_and_whole,
    assert_same,
    drain,
    edits_of,
    note,
    result,
)
from tests.actors.engine.reference.loop import PlainResult, decode
from tests.actors.engine.reference.models import (
    BLOCK,
    CONTEXT,
    MASK,
    build_tokenizer,
    engine_of,
    reference_model,
    token_bytes,
)
from tests.actors.engine.reference.requests import draw_decisive, draw_prompt, expected

from fewstep.actors.engine.request import Request, Update
from fewstep.platform.errors import RequestError
from fewstep.platform.records import DecodePolicy, Trajectory

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

KINDS = ("block_causal", "bidirectional")
PHASES = {
    "static": DecodePolicy(kind="static", tokens_per_step=3),
    "editing": DecodePolicy(kind="static", tokens_per_step=3, edit_threshold=0.1, max_edit_steps=4),
}
WAYS = {"merged": {}, "separate": {"merged_commit": False}, "chunked": {"max_rows": BLOCK}}


def memory_for(contexts: float, kind: str = "block_causal") -> int:
    return int(contexts * CONTEXT * token_bytes(reference_model(kind).config))


@functools.cache
def state_after(request: Request, kind: str, steps: int) -> PlainResult:
    return decode(reference_model(kind), request, tokenizer=build_tokenizer(), stop_after=steps)


def assert_is_the_state_reached(trajectory: Trajectory, request: Request, kind: str) -> None:
    """An aborted trajectory holds what some number of deciding forwards writes, no more than it had forwards."""
    assert trajectory.finish_reason == "abort"
    assert ((trajectory.canvas_ids == MASK) == (trajectory.step_map < 0)).all()
    canvas, step_map = trajectory.canvas_ids.tolist(), trajectory.step_map.tolist()
    states = [state_after(request, kind, steps) for steps in range(trajectory.forwards + 1)]
    reached = [
        state
        for state in states
        if state.canvas == canvas
        and state.step_map == step_map
        and state.num_tokens == trajectory.num_tokens
        and [edit[:3] for edit in state.edits] == [edit[:3] for edit in edits_of(trajectory)]
    ]
    assert reached
    np.testing.assert_allclose(trajectory.logprob, reached[0].logprob, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", WAYS)
def test_an_abort_after_any_number_of_steps_frees_everything(kind: str, phase: str, way: str) -> None:
    policy = PHASES[phase]
    victim = Request("victim", draw_prompt(random.Random(3), 19), policy, max_tokens=20, ignore_eos=True)
    friend = Request("friend", victim.prompt_ids, policy, max_tokens=12)
    engine = engine_of(kind=kind, max_sequences=2, **WAYS[way])
    engine.generate([victim])
    total = engine.forwards
    assert total > 5
    for steps in range(total + 1):
        updates: dict[str, list[Update]] = {}
        for request in (victim, friend, dataclasses.replace(friend, request_id="queued")):
            engine.add(request)
        for _ in range(steps):
            note(updates, engine.step())
        ended = "victim" in updates and updates["victim"][-1].last
        trajectory = engine.abort("victim")
        assert engine.abort("victim") is None
        if ended or steps == 0:
            assert trajectory is None
        else:
            assert trajectory is not None
            assert_is_the_state_reached(trajectory, victim, kind)
        engine.abort("queued")
        # Its name and its slot are free at once.
        engine.add(dataclasses.replace(victim, max_tokens=1))
        drain(engine, updates)
        assert_same(result(updates, friend), expected(friend, kind), num_extra_forwards=None)
        assert_idle_and_whole(engine, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_or_ended_name_aborts_nothing(kind: str) -> None:
    engine = engine_of(kind=kind)
    (request,) = draw_decisive(random.Random(1), 1, kind)
    assert engine.abort("nobody") is None
    assert_same(engine.generate([request])[0], expected(request, kind))
    assert engine.abort(request.request_id) is None
    assert_idle_and_whole(engine, 8)


def overload(kind: str, number: int = 8) -> list[Request]:
    """Requests that each grow to the whole context, two and two from one prompt."""
    requests: list[Request] = []
    seed = 0
    while len(requests) < number:
        seed += 1
        editing = {"edit_threshold": 0.4, "max_edit_steps": 2} if seed % 3 == 0 else {}
        cache = {"cache": ["exact", "none", "prefix", "dual"][seed % 4]} if kind == "bidirectional" else {}
        policy = DecodePolicy(
            kind="static", tokens_per_step=3, temperature=0.7 * (seed % 2), seed=seed, **editing, **cache
        )
        prompt = draw_prompt(random.Random(seed // 2), 7 + seed % 4 // 2 * 9)
        max_tokens = CONTEXT - len(prompt)
        request = Request(str(len(requests)), prompt, policy, max_tokens=max_tokens, ignore_eos=True)
        if expected(request, kind).decisive:
            requests.append(request)
    return requests


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("contexts", [1, 1.6, 2.5])
def test_too_little_memory_costs_time_and_nothing_else(kind: str, way: str, contexts: float) -> None:
    requests = overload(kind)
    engine = engine_of(kind=kind, max_sequences=6, memory_bytes=memory_for(contexts), **WAYS[way])
    page = memory_for(1) // CONTEXT
    assert engine.stats()["pages_total"] * page <= memory_for(contexts)
    for request, trajectory in zip(requests, engine.generate(requests), strict=True):
        assert_same(trajectory, expected(request, kind), num_extra_forwards=None)
    assert_idle_and_whole(engine, 6)


def test_an_overload_does_preempt_and_enough_memory_never_does() -> None:
    requests = overload("block_causal")
    engine = engine_of(max_sequences=6, memory_bytes=memory_for(2))
    engine.generate(requests)
    assert engine.stats()["preemptions"] > 0
    for enough in (None, memory_for(6)):
        engine = engine_of(max_sequences=6, memory_bytes=enough, prefix_cache=False)
        engine.generate(requests)
        assert engine.stats()["preemptions"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_aborting_preempted_requests_frees_everything(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    requests = overload(kind)
    engine = engine_of(kind=kind, max_sequences=6, memory_bytes=memory_for(1.5))
    for request in requests:
        engine.add(request)
    updates: dict[str, list[Update]] = {}
    for _ in range(rng.randint(5, 40)):
        note(updates, engine.step())
    survivors = []
    for request in rng.sample(requests, len(requests)):
        ended = request.request_id in updates and updates[request.request_id][-1].last
        if rng.random() < 0.3 or ended:
            survivors.append(request)
            continue
        trajectory = engine.abort(request.request_id)
        if trajectory is not None:
            assert_is_the_state_reached(trajectory, request, kind)
    drain(engine, updates)
    for request in survivors:
        assert_same(result(updates, request), expected(request, kind), num_extra_forwards=None)
    assert_idle_and_whole(engine, 6)


def test_a_request_that_no_memory_will_ever_hold_is_refused_and_a_smaller_one_served() -> None:
    engine = engine_of(memory_bytes=memory_for(0.5))
    policy = DecodePolicy(kind="static", tokens_per_step=4)
    small = Request("small", (4, 5, 6), policy, max_tokens=20)
    engine.add(small)
    engine.step()
    large = Request("large", (4, 5, 6), policy, max_tokens=60)
    with pytest.raises(RequestError) as caught:
        engine.add(large)
    assert caught.value.field in ("max_tokens", "prompt")
    assert_same(result(drain(engine), small), expected(small))
    assert_idle_and_whole(engine, 8)
