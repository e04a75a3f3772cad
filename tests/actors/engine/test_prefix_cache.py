"""Gate 4: a prefix hit gives what a miss gives, at every offset around a block boundary and under eviction.

Caught here when put into the engine on purpose: a hit one block too long (the live block taken from the cache) or
of another prefix with the same last block; a noisy block entered; keys of old weights hit; a page evicted or handed
out while someone reads it; a poisoned page entered.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from tests.actors.engine.reference.compare import (
    assert_idle_and_whole,
    assert_same,
    drain,
    note,
    result,
    run,
)
from tests.actors.engine.reference.loop import decode
from tests.actors.engine.reference.models import (
    BLOCK,
    CONTEXT,
    VERSION,
    WORDS,
    build_model,
    build_tokenizer,
    engine_of,
    reference_model,
    token_bytes,
)
from tests.actors.engine.reference.requests import draw_decisive, draw_prompt, expected

from fewstep.actors.engine.request import Request, Update
from fewstep.kernels.model.checkpoint import state_checksum
from fewstep.platform.records import DecodePolicy, WeightVersion

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

POLICY = DecodePolicy(kind="static", tokens_per_step=2)
OFFSETS = (-1, 0, 1)


def request_of(name: str, prompt: tuple[int, ...], max_tokens: int = 10, seed: int = 0) -> Request:
    policy = DecodePolicy(kind="static", tokens_per_step=2, temperature=0.8, seed=seed)
    return Request(name, prompt, policy, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.parametrize("length", OFFSETS)
@pytest.mark.parametrize("shared", [*OFFSETS, None])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_hit_equals_a_miss_around_a_block_boundary(blocks: int, length: int, shared: int | None) -> None:
    """A second prompt of `blocks` blocks + `length` tokens that parts from the first after `blocks` blocks + `shared`."""
    first = draw_prompt(random.Random(blocks), (blocks + 1) * BLOCK + 3)
    size = blocks * BLOCK + length
    common = size if shared is None else min(size, blocks * BLOCK + shared)
    second = (*first[:common], *(token % (len(WORDS) - 1) + 1 for token in first[common:size]))
    engine = engine_of()
    engine.generate([request_of("first", first)])
    hits_before, rows = engine.stats()["prefix_hits"], engine.rows
    request = request_of("second", second)
    assert_same(engine.generate([request])[0], expected(request))
    hits = min(common, size) // BLOCK
    assert engine.stats()["prefix_hits"] - hits_before == hits
    cold = engine_of(prefix_cache=False)
    assert_same(cold.generate([request])[0], expected(request))
    assert cold.stats()["prefix_hits"] == cold.stats()["pages_cached"] == 0
    assert engine.rows - rows == cold.rows - hits * BLOCK


def test_a_prefix_is_the_whole_way_to_a_block_not_its_own_tokens() -> None:
    """Equal second blocks behind different first ones, and equal blocks at other positions, are other entries."""
    a, b, c = (draw_prompt(random.Random(seed), BLOCK) for seed in range(3))
    engine = engine_of()
    engine.generate([request_of("first", a + b + c)])
    for number, prompt in enumerate((c + b + a, b + c, a + c + b, a + a + b + c)):
        request = request_of(str(number), prompt)
        assert_same(engine.generate([request])[0], expected(request))
    # Only `a` at the very beginning is the same prefix again.
    assert engine.stats()["prefix_hits"] == 2


def test_a_group_shares_its_prompt_whatever_time_its_members_start() -> None:
    prompt = draw_prompt(random.Random(1), 3 * BLOCK + 5)
    group = [request_of(str(seed), prompt, max_tokens=20, seed=seed) for seed in range(9)]
    engine = engine_of(max_sequences=3)
    updates: dict[str, list[Update]] = {}
    for request in group:
        engine.add(request)
        note(updates, engine.step())
    drain(engine, updates)
    for request in group:
        assert_same(result(updates, request), expected(request))
    # All but the first came when the prompt's blocks were there.
    assert engine.stats()["prefix_hits"] >= 3 * (len(group) - 1)
    assert len({tuple(result(updates, request).canvas_ids.tolist()) for request in group}) > 5


def test_an_answer_is_a_prefix_of_the_next_turn() -> None:
    engine = engine_of()
    prompt: tuple[int, ...] = draw_prompt(random.Random(4), 5)
    for turn in range(4):
        request = request_of(str(turn), prompt, max_tokens=9)
        trajectory = engine.generate([request])[0]
        assert_same(trajectory, expected(request))
        prompt = (*prompt, *trajectory.completion_ids.tolist(), 4, 5)


@pytest.mark.parametrize("contexts", [1.25, 2, 3])
def test_eviction_while_blocks_are_half_denoised_moves_no_token(contexts: float) -> None:
    """Memory for a few sequences; many prompts of several families come and go, so that entries are evicted."""
    rng = random.Random(int(contexts * 4))
    families = [draw_prompt(rng, 4 * BLOCK) for _ in range(5)]
    config = engine_of().config
    engine = engine_of(max_sequences=4, memory_bytes=int(contexts * CONTEXT * token_bytes(config)))
    requests, updates = [], {}
    for number in range(60):
        keep = rng.randint(0, 4 * BLOCK)
        prompt = (*rng.choice(families)[:keep], *draw_prompt(rng, rng.randint(1, 12)))
        requests.append(request_of(str(number), prompt, max_tokens=rng.randint(1, 20), seed=number))
        engine.add(requests[-1])
        for _ in range(rng.randint(0, 6)):
            note(updates, engine.step())
    drain(engine, updates)
    for request in requests:
        assert_same(result(updates, request), expected(request), num_extra_forwards=None)
    stats = engine.stats()
    assert stats["prefix_hits"] > 10
    assert stats["pages_cached"] <= stats["pages_total"]
    assert_idle_and_whole(engine, 4)


def test_entries_come_back_after_the_cache_was_cleared_under_running_requests() -> None:
    engine = engine_of()
    requests = draw_decisive(random.Random(2), 12)
    updates: dict[str, list[Update]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        note(updates, engine.step())
        engine.clear_prefix_cache()
    for request in requests:
        assert_same(result(updates, request), expected(request))
    assert_idle_and_whole(engine, 8)


def other_weights(seed: int = 1) -> tuple[dict[str, torch.Tensor], WeightVersion]:
    state = dict(build_model(seed).state_dict())
    return state, WeightVersion("test", seed, state_checksum(state))


def test_new_weights_never_read_what_old_ones_wrote() -> None:
    prompt = draw_prompt(random.Random(6), 4 * BLOCK + 2)
    engine = engine_of()
    state, version = other_weights()
    request = request_of("a", prompt)
    assert_same(engine.generate([request])[0], expected(request))
    engine.load_weights(state, version)
    hits = engine.stats()["prefix_hits"]
    assert_same(engine.generate([request])[0], expected(request, seed=1))
    assert engine.stats()["prefix_hits"] == hits
    # Warm under the new weights, then back: whether or not old entries survived, they are the old weights' own.
    assert_same(engine.generate([request])[0], expected(request, seed=1))
    engine.load_weights(dict(build_model().state_dict()), VERSION)
    assert_same(engine.generate([request])[0], expected(request))
    # A careless caller who gives other weights the same name gets no stale keys either.
    engine.load_weights(state, VERSION)
    assert_same(engine.generate([request])[0], expected(request, seed=1))


@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        *(("block_causal", cache) for cache in ("exact", "none")),
        *(("bidirectional", cache) for cache in ("exact", "none", "prefix", "dual")),
    ],
)
@pytest.mark.parametrize("when", [0, 1, 2, 5, 9])
def test_a_swap_between_two_steps_recomputes_everything_kept(kind: str, when: int, cache: str) -> None:
    engine = engine_of(kind=kind, max_rows=2 * BLOCK)
    policy = DecodePolicy(kind="static", tokens_per_step=2, temperature=0.7, seed=when, cache=cache)
    # A prompt shorter than a block has no chunks, so the engine's forwards before the swap are the deciding ones.
    requests = [
        Request(str(size), draw_prompt(random.Random(size), size), policy, max_tokens=30, ignore_eos=True)
        for size in (3, 5, 6)
    ]
    for request in requests:
        engine.add(request)
    updates: dict[str, list[Update]] = {}
    for _ in range(when):
        note(updates, engine.step())
    state, version = other_weights()
    engine.load_weights(state, version)
    drain(engine, updates)
    for request in requests:
        plain = decode(
            reference_model(kind),
            request,
            tokenizer=build_tokenizer(),
            swap=(when, reference_model(kind, 1)),
        )
        trajectory = result(updates, request)
        assert_same(trajectory, plain, num_extra_forwards=None)
        first = version if when == 0 else VERSION
        assert (trajectory.weight_version_first, trajectory.weight_version_last) == (str(first), str(version))
    assert_idle_and_whole(engine, 8)


def test_a_page_that_held_poison_harms_no_one_after_it() -> None:
    engine = engine_of(max_sequences=2)
    healthy = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    broken = {name: tensor.clone() for name, tensor in healthy.items()}
    broken["layers.0.self_attn.v_proj.weight"] *= torch.nan
    requests = [
        Request(str(size), draw_prompt(random.Random(size), size), POLICY, max_tokens=9)
        for size in (25, 3, 17, 26, 40)
    ]
    engine.load_weights(broken, VERSION)
    assert all(updates[-1].error for updates in run(engine, requests).values())
    assert engine.stats()["pages_cached"] == 0
    engine.load_weights(healthy, VERSION)
    for request, trajectory in zip(requests, engine.generate(requests[::-1])[::-1], strict=True):
        assert_same(trajectory, expected(dataclasses.replace(request)))
    assert_idle_and_whole(engine, 2)
