"""Models whose logits are shifted: the row before a position speaks for it, in its block or at the end of the last one."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from tests.actors.engine.reference import models
from tests.actors.engine.reference.compare import assert_same, whole_afterwards
from tests.actors.engine.reference.loop import decode
from tests.actors.engine.reference.models import BLOCK, VERSION, build_model, build_tokenizer, token_bytes
from tests.actors.engine.reference.requests import draw_prompt, draw_request

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.records import DecodePolicy

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

KINDS = ("block_causal", "bidirectional")


def shifted_model(kind: str) -> Transformer:
    plain = build_model(0, kind)
    model = Transformer(plain.config.model_copy(update={"logit_shift": True}))
    model.load_state_dict(plain.state_dict())
    return model.eval()


def engine_of(kind: str, max_sequences: int, **settings: object) -> Engine:
    return Engine(
        shifted_model(kind),
        build_tokenizer(),
        max_sequences=max_sequences,
        weight_version=VERSION,
        **{"static_steps": models.STATIC_STEPS, **settings},
    )  # type: ignore[arg-type]


@functools.cache
def decisive(kind: str, number: int) -> list[tuple[Request, object]]:
    """Requests with what the plain loop makes of them, none of whose decisions hangs on rounding."""
    model, tokenizer, rng = shifted_model(kind), build_tokenizer(), random.Random(11)
    pairs = []
    while len(pairs) < number:
        request = draw_request(rng, f"{len(pairs)}", kind=kind, approximate=False)
        plain = decode(model, request, tokenizer=tokenizer)
        if plain.decisive:
            pairs.append((request, plain))
    return pairs


@pytest.mark.parametrize(
    "settings", [{}, {"merged_commit": False}, {"prefix_cache": False}, {"max_rows": BLOCK}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_policy_equals_the_plain_loop(kind: str, settings: dict[str, object]) -> None:
    pairs = decisive(kind, 60)
    with whole_afterwards(engine_of(kind, 7, **settings), 7) as engine:
        trajectories = engine.generate([request for request, _ in pairs])
    for (_, plain), trajectory in zip(pairs, trajectories, strict=True):
        extra = 0 if kind == "bidirectional" or settings in ({}, {"prefix_cache": False}) else None
        assert_same(trajectory, plain, num_extra_forwards=extra)


def test_the_draws_reach_both_edges_of_a_block() -> None:
    """Prompts that end at a block's edge, so that the first mask of all is predicted by the prompt's last block, and
    generated blocks behind the first, whose first token is predicted by what was generated."""
    pairs = decisive("block_causal", 60)
    assert sum(len(request.prompt_ids) % BLOCK == 0 for request, _ in pairs) >= 3
    assert sum(plain.num_blocks > 1 for _, plain in pairs) >= 20
    assert any(plain.edits for _, plain in pairs)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_shared_prompt_is_read_and_never_written_again(offset: int) -> None:
    """The row that predicts a block's first token lies in a page of another request: run again, not stored again."""
    prompt = draw_prompt(random.Random(offset), 3 * BLOCK + offset)
    policy = DecodePolicy(kind="static")
    request = Request("a", prompt, policy, max_tokens=12, ignore_eos=True)
    plain = decode(shifted_model("block_causal"), request, tokenizer=build_tokenizer())
    engine = engine_of("block_causal", 2)
    assert_same(engine.generate([request])[0], plain)
    published, hits = sorted(engine._pool._published), engine.stats()["prefix_hits"]
    engine._store.keys[:, published] *= (
        1 + 1e-6
    )  # as nobody would compute them; small enough to change no token
    marked = engine._store.keys[:, published].clone()
    again = engine.generate([Request("b", prompt, policy, max_tokens=12, ignore_eos=True)])[0]
    assert_same(again, plain)
    assert engine.stats()["prefix_hits"] > hits
    assert torch.equal(engine._store.keys[:, published], marked)


def test_a_pool_too_small_for_all_recomputes_and_says_the_same() -> None:
    pairs = [(r, p) for r, p in decisive("block_causal", 60) if r.policy.cache == "exact"][:20]
    budget = 8 * BLOCK * token_bytes(shifted_model("block_causal").config)
    engine = engine_of("block_causal", 6, memory_bytes=budget, prefix_cache=False)
    for (_, plain), trajectory in zip(pairs, engine.generate([r for r, _ in pairs]), strict=True):
        assert_same(trajectory, plain, num_extra_forwards=None)
    assert engine.stats()["preemptions"] > 0
