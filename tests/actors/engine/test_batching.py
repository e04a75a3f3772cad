"""Gate 2: company, order of arrival, chunks of the prompt, cache hits, preemption: none of them moves a token.

Caught here when put into the engine on purpose: rows of one sequence seeing another's; a policy number, seed or
count read from the wrong slot; a slot or page reused before its owner let go or without its state reset; a chunk
that leaves a block out or writes one twice; draws keyed by forwards that decide nothing.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.actors.engine.reference.compare import (
    assert_equal,
    assert_idle_and_whole,
    assert_same,
    drain,
    note,
    result,
)
from tests.actors.engine.reference.models import BLOCK, CONTEXT, engine_of, token_bytes
from tests.actors.engine.reference.requests import draw_decisive, draw_policy, draw_prompt, expected

from fewstep.actors.engine.request import Request, Update
from fewstep.platform.records import DecodePolicy

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

KINDS = ("block_causal", "bidirectional")
MANY = settings(max_examples=50, deadline=None, derandomize=True)


def draw_settings(rng: random.Random, kind: str) -> dict[str, object]:
    """Any way to set up an engine; memory for between one and three sequences of full length, or for all."""
    contexts = rng.choice([None, None, 1, 1.5, 3])
    config = engine_of(kind=kind).config
    return {
        "max_sequences": rng.randint(1, 5),
        "merged_commit": rng.random() < 0.7,
        "prefix_cache": rng.random() < 0.7,
        "max_rows": rng.choice([None, BLOCK, 2 * BLOCK, 3 * BLOCK]),
        "memory_bytes": None if contexts is None else int(contexts * CONTEXT * token_bytes(config)),
    }


def draw_relatives(rng: random.Random, requests: list[Request], kind: str) -> list[Request]:
    """The requests, and copies that share a prompt, or a part of one, under another policy."""
    family = list(requests)
    for number in range(rng.randint(0, 3)):
        origin = rng.choice(requests)
        keep = rng.choice([len(origin.prompt_ids), rng.randint(0, len(origin.prompt_ids))])
        prompt = (*origin.prompt_ids[:keep], *draw_prompt(rng, len(origin.prompt_ids) - keep))
        relative = dataclasses.replace(
            origin, request_id=f"relative{number}", prompt_ids=prompt, policy=draw_policy(rng, kind)
        )
        if expected(relative, kind).decisive:
            family.append(relative)
    rng.shuffle(family)
    return family


@pytest.mark.parametrize("kind", KINDS)
@MANY
@given(seed=st.integers(0, 10**6))
def test_results_do_not_depend_on_company_arrival_chunks_cache_or_memory(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    settings_ = draw_settings(rng, kind)
    requests = draw_relatives(rng, draw_decisive(rng, rng.randint(1, 5), kind), kind)
    engine = engine_of(kind=kind, **settings_)
    updates: dict[str, list[Update]] = {}
    for request in requests:
        engine.add(request)
        for _ in range(rng.choice([0, 0, 1, 2, 5, 30])):
            note(updates, engine.step())
    drain(engine, updates)
    for request in requests:
        assert_same(result(updates, request), expected(request, kind), num_extra_forwards=None)
    assert_idle_and_whole(engine, int(str(settings_["max_sequences"])))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_n_equals_n_singles_in_any_order(kind: str) -> None:
    rng = random.Random(5)
    requests = draw_decisive(rng, 30, kind)
    alone = engine_of(kind=kind, prefix_cache=False)
    singles = {request.request_id: alone.generate([request])[0] for request in requests}
    for slots in (3, 30):
        rng.shuffle(requests)
        together = engine_of(max_sequences=slots, kind=kind).generate(requests)
        for request, trajectory in zip(requests, together, strict=True):
            assert_equal(trajectory, singles[request.request_id])


@pytest.mark.parametrize("num_prompt", [7, 8, 9, 25, 40, 55])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_chunked_prompt_costs_the_forwards_it_needs(num_prompt: int, blocks: int) -> None:
    """n clean blocks, c of them a forward: all but the last chunk, which rides with the live block, cost one each."""
    prompt = draw_prompt(random.Random(num_prompt), num_prompt)
    request = Request("a", prompt, DecodePolicy(temperature=1.0, seed=3), max_tokens=8, ignore_eos=True)
    engine = engine_of(max_rows=blocks * BLOCK)
    num_chunks = max(0, -(-(num_prompt // BLOCK) // blocks) - 1)
    assert_same(engine.generate([request])[0], expected(request), num_extra_forwards=num_chunks)
    assert engine.forwards == expected(request).forwards + num_chunks


def test_a_long_prompt_in_chunks_does_not_hold_up_the_others() -> None:
    policy = DecodePolicy(kind="static")
    short = Request("short", (4, 5), policy, max_tokens=6, ignore_eos=True)
    long = Request("long", draw_prompt(random.Random(0), 55), policy, max_tokens=8, ignore_eos=True)
    engine = engine_of(max_rows=BLOCK)
    updates: dict[str, list[Update]] = {}
    for request in (long, short):
        engine.add(request)
    for _ in range(6):
        note(updates, engine.step())
    assert result(updates, short).forwards == 6
    drain(engine, updates)
    for request in (long, short):
        assert_same(result(updates, request), expected(request), num_extra_forwards=None)
