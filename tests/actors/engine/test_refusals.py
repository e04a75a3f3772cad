"""Gate 6 and bad input: what cannot be served is refused by its field or fails alone; the batch goes on.

Caught here when put into the engine on purpose: a check that reads only the first, last, smallest or largest token;
one that leaves out the suffix; an end of sequence of the prompt or suffix that ends or fills; a failure that takes
its neighbours along or leaves its numbers behind.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from tests.actors.engine.reference.compare import assert_idle_and_whole, assert_same, drain, result, run
from tests.actors.engine.reference.models import BLOCK, CONTEXT, EOS, MASK, PAD, WORDS, engine_of
from tests.actors.engine.reference.requests import draw_prompt, expected

from fewstep.actors.engine.request import Request
from fewstep.platform.errors import RequestError
from fewstep.platform.records import DecodePolicy

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

KINDS = ("block_causal", "bidirectional")
ONE_BY_ONE = DecodePolicy(kind="static", tokens_per_step=1)
# Around block boundaries, at both ends and between.
PLACES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 18)
NEVER = {"mask": MASK, "negative": -1, "behind the vocabulary": len(WORDS), "far behind it": 2**40}
HARMLESS = {"end of sequence": EOS, "padding": PAD, "last of the vocabulary": len(WORDS) - 1}


def with_token(token: int, place: int, where: str) -> Request:
    """A request of 19 prompt tokens, or of 10 with a suffix of 19, with one token replaced."""
    prompt, suffix = draw_prompt(random.Random(1), 19), draw_prompt(random.Random(2), 19)
    replaced = list(prompt if where == "prompt" else suffix)
    replaced[place] = token
    if where == "prompt":
        return Request("a", tuple(replaced), ONE_BY_ONE, max_tokens=9)
    return Request("a", prompt[:10], ONE_BY_ONE, max_tokens=9, suffix_ids=tuple(replaced))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["prompt", "suffix"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("token", NEVER)
def test_a_token_that_can_never_stand_there_is_refused(kind: str, where: str, place: int, token: str) -> None:
    engine = engine_of(kind=kind)
    with pytest.raises(RequestError) as caught:
        engine.add(with_token(NEVER[token], place, where))
    assert where in caught.value.field
    assert not engine.has_work


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["prompt", "suffix"])
def test_special_tokens_that_may_stand_there_end_nothing(kind: str, where: str) -> None:
    requests = [
        dataclasses.replace(with_token(token, place, where), request_id=f"{token} {place}")
        for token in HARMLESS.values()
        for place in PLACES
    ]
    requests = [request for request in requests if expected(request, kind).decisive]
    engine = engine_of(kind=kind, max_sequences=5)
    for request, trajectory in zip(requests, engine.generate(requests), strict=True):
        assert_same(trajectory, expected(request, kind))
    ends = [expected(request, kind).finish_reason for request in requests]
    assert "length" in ends
    # A token that ends a request ends it only where the model writes it.
    stop = Request("stop", (4, 5, 6), ONE_BY_ONE, max_tokens=9, stop_ids=(4, 6))
    assert_same(engine.generate([stop])[0], expected(stop, kind))


GOOD = Request("good", (3, 4), ONE_BY_ONE, max_tokens=CONTEXT - 2, ignore_eos=True)


def policy(**changes: object) -> dict[str, object]:
    return {"policy": DecodePolicy(**changes)}


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        *((kind, {"prompt_ids": ()}, "prompt") for kind in KINDS),
        *((kind, {"max_tokens": 0}, "max_tokens") for kind in KINDS),
        *((kind, {"max_tokens": CONTEXT - 1}, "max_tokens") for kind in KINDS),
        *((kind, {"prompt_ids": (3,) * CONTEXT, "max_tokens": 1}, "max_tokens") for kind in KINDS),
        *((kind, {"stop": ("a", "")}, "stop") for kind in KINDS),
        ("block_causal", policy(block_size=BLOCK // 2), "block_size"),
        ("block_causal", policy(block_size=2 * BLOCK), "block_size"),
        ("bidirectional", policy(block_size=CONTEXT + 1), "block_size"),
        ("block_causal", policy(cache="prefix"), "cache"),
        ("block_causal", policy(cache="dual"), "cache"),
        # The hole 2..7 ends where a block does, so no suffix token shares a block with a mask.
        ("block_causal", {"suffix_ids": (5,), "max_tokens": BLOCK - 2}, "suffix"),
        ("block_causal", {"suffix_ids": (5,), "max_tokens": 3 * BLOCK - 2}, "suffix"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_field(
    kind: str, change: dict[str, object], field: str
) -> None:
    engine = engine_of(kind=kind)
    bad = dataclasses.replace(GOOD, request_id="bad", **change)
    with pytest.raises(RequestError) as caught:
        engine.generate([GOOD, bad])
    assert field in caught.value.field
    assert not engine.has_work
    # Refused while others run, it leaves them alone.
    engine.add(GOOD)
    engine.step()
    with pytest.raises(RequestError):
        engine.add(bad)
    assert_same(result(drain(engine), GOOD), expected(GOOD, kind))
    assert_idle_and_whole(engine, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_suffix_counts_towards_the_context(kind: str) -> None:
    engine = engine_of(kind=kind)
    fits = Request(
        "a", (3, 4), ONE_BY_ONE, max_tokens=9, suffix_ids=draw_prompt(random.Random(3), CONTEXT - 11)
    )
    assert_same(engine.generate([fits])[0], expected(fits, kind))
    with pytest.raises(RequestError) as caught:
        engine.add(dataclasses.replace(fits, suffix_ids=(*fits.suffix_ids, 5)))
    assert caught.value.field in ("max_tokens", "suffix")


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_just_fit_are_served(kind: str) -> None:
    whole = Request("whole", draw_prompt(random.Random(5), CONTEXT - 1), ONE_BY_ONE, max_tokens=1)
    block = Request("block", (3, 4, 5), DecodePolicy(block_size=BLOCK), max_tokens=5)
    requests = [GOOD, whole, block]
    if kind == "bidirectional":
        requests.append(Request("wide", (3, 4, 5), DecodePolicy(block_size=CONTEXT), max_tokens=20))
    for request, trajectory in zip(requests, engine_of(kind=kind).generate(requests), strict=True):
        assert_same(trajectory, expected(request, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setup", [{}, {"merged_commit": False}, {"max_rows": BLOCK}])
def test_unusable_logits_fail_their_request_only(kind: str, setup: dict[str, object]) -> None:
    engine = engine_of(kind=kind, max_sequences=3, **setup)
    healthy = engine.model.rope_cos.clone()
    # Positions from 24 on are poisoned, which only some requests reach: in their prompt, their first or a later
    # block of a block-causal model.
    engine.model.rope_cos[24:] = torch.nan
    reaching = [
        Request(
            f"long {size}", draw_prompt(random.Random(size), size), ONE_BY_ONE, max_tokens=20, ignore_eos=True
        )
        for size in (5, 24, 33)
    ]
    within = [
        Request(f"short {size}", draw_prompt(random.Random(size), size), ONE_BY_ONE, max_tokens=6)
        for size in (3, 9, 18)
    ]
    updates = run(engine, [request for pair in zip(reaching, within, strict=True) for request in pair])
    for request in within:
        assert_same(result(updates, request), expected(request, kind), num_extra_forwards=None)
    for request in reaching:
        assert updates[request.request_id][-1].trajectory is None
        assert "finite" in updates[request.request_id][-1].error
        assert sum(update.last for update in updates[request.request_id]) == 1
    with pytest.raises(RequestError, match="long 24"):
        engine.generate([within[0], reaching[1], within[1]])
    assert not engine.has_work
    # Once the model is sound again, nothing of what they left behind is met.
    engine.model.rope_cos.copy_(healthy)
    for request, trajectory in zip(reaching, engine.generate(reaching), strict=True):
        assert_same(trajectory, expected(request, kind), num_extra_forwards=None)
    assert_idle_and_whole(engine, 3)


def test_unusable_numbers_in_a_page_do_not_come_through_the_mask_of_others() -> None:
    """A page that somebody else reads in place of one he does not have is poisoned while it is: 0 · NaN is NaN.

    The first page belongs to `short`, then to the poisoned block of `broken`, whose prompt comes a block at a time and so
    is poisoned before its logits are asked for. Sequences without a past read that page under a mask.
    """
    engine = engine_of(max_rows=BLOCK, prefix_cache=False)
    engine.model.rope_cos[24:] = torch.nan
    in_three = DecodePolicy(kind="static", tokens_per_step=3)
    short = Request("short", draw_prompt(random.Random(1), 9), in_three, max_tokens=7, ignore_eos=True)
    no_past = Request("no past", (3, 4, 5), ONE_BY_ONE, max_tokens=13, ignore_eos=True)
    a_past = Request("a past", draw_prompt(random.Random(2), 9), ONE_BY_ONE, max_tokens=14, ignore_eos=True)
    broken = Request("broken", draw_prompt(random.Random(3), 33), ONE_BY_ONE, max_tokens=5)
    updates = run(engine, [short, no_past, a_past, broken])
    assert "finite" in updates["broken"][-1].error
    for request in (short, no_past, a_past):
        assert_same(result(updates, request), expected(request))
    assert_idle_and_whole(engine, 8)
