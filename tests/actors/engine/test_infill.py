"""Infill and editing where it is tight: every way a hole, a block, a page and a suffix can meet, and what must not move.

Caught here when put into the engine on purpose: a live block that reaches into the suffix; a suffix token written,
edited or counted; a position behind the suffix decided; an edit of the prompt, behind an end, or by a request that
asked for none.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest
from tests.actors.engine.reference.compare import assert_same, edits_of
from tests.actors.engine.reference.models import BLOCK, EOS, MASK, engine_of
from tests.actors.engine.reference.requests import draw_decisive, draw_prompt, expected

from fewstep.actors.engine.request import Request
from fewstep.platform.records import DecodePolicy

KINDS = ("block_causal", "bidirectional")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["exact", "prefix", "dual"])
def test_a_hole_of_any_size_at_any_place(kind: str, cache: str) -> None:
    """Prompts, holes and suffixes that end before, at and behind blocks of 8 and pages of 8 or 16."""
    if kind == "block_causal":
        cache = {"exact": "exact", "prefix": "none", "dual": "exact"}[cache]
    rng = random.Random(cache)
    sizes = itertools.product((7, 8, 9, 15, 16), (3, 7, 8, 9, 15), (1, 2, 9))
    requests = []
    for number, (prompt, hole, suffix) in enumerate(sizes):
        if kind == "block_causal" and (prompt + hole) % BLOCK == 0:
            continue
        policy = DecodePolicy(kind="static", tokens_per_step=2, cache=cache)
        request = Request(
            str(number),
            draw_prompt(rng, prompt),
            policy,
            max_tokens=hole,
            suffix_ids=draw_prompt(rng, suffix),
            ignore_eos=True,
        )
        if expected(request, kind).decisive:
            requests.append(request)
    assert len(requests) > 50
    for request, trajectory in zip(requests, engine_of(kind=kind).generate(requests), strict=True):
        assert_same(trajectory, expected(request, kind))
        assert len(trajectory.canvas_ids) == trajectory.num_tokens == request.max_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_suffix_is_seen_and_where_it_begins_matters(kind: str) -> None:
    policy = DecodePolicy(kind="static", tokens_per_step=1)
    base = Request("a", (4, 5, 6), policy, max_tokens=3, ignore_eos=True)
    canvases = {
        tuple(engine_of(kind=kind).generate([dataclasses.replace(base, suffix_ids=suffix)])[0].canvas_ids)
        for suffix in [(), *((token,) for token in range(7, 13)), (7, 8), (8, 7)]
    }
    assert len(canvases) > 4


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_request_lets_the_model_write_is_ever_written(kind: str) -> None:
    requests = draw_decisive(random.Random(41), 50, kind)
    edits = 0
    for request, trajectory in zip(requests, engine_of(kind=kind).generate(requests), strict=True):
        assert trajectory.prompt_ids.tolist() == list(request.prompt_ids)
        assert trajectory.suffix_ids.tolist() == list(request.suffix_ids)
        assert MASK not in trajectory.completion_ids
        for position, step, token, _ in edits_of(trajectory):
            assert request.policy.edit_threshold is not None
            assert token != MASK
            assert step < trajectory.step_map[position]
            assert 0 <= position < len(trajectory.canvas_ids)
        edits += len(trajectory.edit_position)
        chosen = np.isin(np.arange(len(trajectory.canvas_ids)), trajectory.edit_position)
        if request.policy.edit_threshold is not None:
            assert (trajectory.confidence[chosen] > request.policy.edit_threshold).all()
    assert edits > 20


def test_with_editing_too_max_tokens_only_truncates() -> None:
    """A block is denoised and edited to its end whatever max_tokens cuts off it, so that a limit moves no token."""
    policy = DecodePolicy(threshold=0.5, edit_threshold=0.15, max_edit_steps=4)
    request = Request("a", draw_prompt(random.Random(2), 5), policy, max_tokens=30, ignore_eos=True)
    whole = engine_of().generate([request])[0]
    assert len(whole.edit_position) > 3
    for limit in range(1, 30, 3):
        cut = engine_of().generate([dataclasses.replace(request, max_tokens=limit)])[0]
        assert cut.completion_ids.tolist() == whole.completion_ids[:limit].tolist()


def test_an_end_that_is_edited_away_leaves_what_was_filled_behind_it() -> None:
    """Found by search, so that the rule is exercised: an end goes, the first position filled behind it is the end."""
    policy = DecodePolicy(threshold=0.5, edit_threshold=0.05, max_edit_steps=6, temperature=1.0)
    moved = 0
    for seed in range(60):
        request = Request(
            "a",
            (3 + seed % 30, 4, 5),
            policy.model_copy(update={"seed": seed}),
            max_tokens=13,
            stop_ids=(6, 19),
        )
        plain = expected(request)
        lost_end = [edit for edit in plain.edits if edit[2] in (EOS, 6, 19)]
        if lost_end and plain.decisive:
            moved += 1
            assert_same(engine_of().generate([request])[0], plain)
    assert moved > 10
