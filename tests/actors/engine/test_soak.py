"""Gate 5, at length: ten thousand random requests with aborts, failures and new weights; the pool ends as it began."""

from __future__ import annotations

import random

import pytest
import torch
from tests.actors.engine.reference.compare import assert_idle_and_whole, assert_same
from tests.actors.engine.reference.loop import decode
from tests.actors.engine.reference.models import (
    VERSION,
    build_minute_model,
    build_tokenizer,
    token_bytes,
)

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.model.config import AttentionKind
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.records import DecodePolicy, WeightVersion

VOCABULARY, CONTEXT, SLOTS = 12, 32, 48


class Traffic:
    """Random requests, of which many share the beginning of their prompts."""

    def __init__(self, kind: AttentionKind, seed: int) -> None:
        self.kind, self.rng, self.count = kind, random.Random(seed), 0
        self.families = [self._tokens(20) for _ in range(12)]

    def _tokens(self, size: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(1, VOCABULARY) for _ in range(size))

    def request(self) -> Request:
        rng = self.rng
        self.count += 1
        prompt = (*rng.choice(self.families)[: rng.randint(0, 20)], *self._tokens(rng.randint(1, 4)))
        bidirectional = self.kind == "bidirectional"
        policy = DecodePolicy(
            kind="static",
            tokens_per_step=rng.choice([1, 2, 4]),
            temperature=rng.choice([0.0, 1.0]),
            seed=self.count,
            edit_threshold=rng.choice([None, None, 0.4]),
            cache=rng.choice(["exact", "prefix", "dual"]) if bidirectional else "exact",
            block_size=rng.choice([2, 4, 7]) if bidirectional else None,
        )
        max_tokens = rng.randint(1, min(10, CONTEXT - len(prompt)))
        return Request(str(self.count), prompt, policy, max_tokens=max_tokens)


def soak(engine: Engine, traffic: Traffic, number: int, models: list[Transformer]) -> dict[str, int]:
    """Drive `number` requests through the engine, comparing some; what happened, counted."""
    rng, requests, joined = traffic.rng, {}, {}
    counts = {"ended": 0, "aborted": 0, "compared": 0, "swaps": 0}
    current, swapped_at = 0, 0
    while traffic.count < number or engine.has_work:
        for _ in range(rng.choice([0, 2, 10, 60]) if traffic.count < number else 0):
            request = traffic.request()
            requests[request.request_id] = request
            joined[request.request_id] = counts["swaps"]
            engine.add(request)
        for update in engine.step():
            if not update.last:
                continue
            assert update.error is None
            counts["ended"] += 1
            request = requests.pop(update.request_id)
            if joined[update.request_id] == counts["swaps"] and counts["ended"] % 40 == 0:
                plain = decode(models[current], request)
                if plain.decisive:
                    counts["compared"] += 1
                    assert_same(update.trajectory, plain, num_extra_forwards=None)
        for _ in range(rng.choice([0, 0, 1, 5])):
            if requests:
                name = rng.choice(list(requests))
                engine.abort(name)
                del requests[name]
                counts["aborted"] += 1
        stats = engine.stats()
        assert stats["num_running"] + stats["slots_free"] == SLOTS
        assert 0 <= stats["pages_free"] <= stats["pages_total"]
        assert 0 <= stats["pages_cached"] <= stats["pages_total"] - stats["pages_free"]
        if engine.forwards > swapped_at + 250:
            swapped_at, current = engine.forwards, 1 - current
            counts["swaps"] += 1
            version = VERSION if current == 0 else WeightVersion("test", 1, "1" * 32)
            engine.load_weights(models[current].state_dict(), version)
    assert not requests
    return counts


@pytest.mark.parametrize(
    ("kind", "number", "settings"),
    [
        ("block_causal", 4500, {"contexts": 12}),
        ("block_causal", 2000, {"contexts": 6, "merged_commit": False, "max_rows": 8}),
        ("block_causal", 1500, {"contexts": None, "prefix_cache": False, "static_steps": True}),
        ("bidirectional", 2000, {"contexts": 12, "static_steps": True}),
    ],
)
def test_ten_thousand_requests_leave_the_pool_as_it_was(
    kind: AttentionKind, number: int, settings: dict[str, object]
) -> None:
    models = [build_minute_model(kind, VOCABULARY, seed=seed) for seed in (2, 3)]
    settings = dict(settings)
    contexts = settings.pop("contexts")
    engine = Engine(
        build_minute_model(kind, VOCABULARY),
        build_tokenizer(VOCABULARY),
        max_sequences=SLOTS,
        weight_version=VERSION,
        memory_bytes=None if contexts is None else int(contexts) * CONTEXT * token_bytes(models[0].config),
        **settings,
    )
    before = engine.stats()
    counts = soak(engine, Traffic(kind, number), number, models)
    assert counts["ended"] + counts["aborted"] >= number
    assert counts["ended"] > number / 2
    assert counts["aborted"] > number / 20
    assert counts["compared"] > number / 200
    stats = engine.stats()
    if kind == "block_causal" and contexts is not None:
        assert stats["prefix_hits"] > number / 4
        assert stats["preemptions"] > 0
    assert_idle_and_whole(engine, SLOTS)
    assert engine.stats()["pages_total"] == before["pages_total"]
    # Nothing of the last weights or requests is left in what a new request computes.
    request = Traffic(kind, 1).request()
    with torch.inference_mode():
        engine.load_weights(models[0].state_dict(), VERSION)
    assert_same(engine.generate([request])[0], decode(models[0], request), num_extra_forwards=None)
