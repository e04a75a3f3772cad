"""Requests of every kind, drawn from a `random.Random` (hypothesis' own shrinks them)."""

from __future__ import annotations

import functools
import random

from tests.actors.engine.reference.loop import PlainResult, decode
from tests.actors.engine.reference.models import (
    BLOCK,
    CONTEXT,
    WORDS,
    build_tokenizer,
    reference_model,
)

from fewstep.actors.engine.request import Request
from fewstep.kernels.model.config import AttentionKind
from fewstep.platform.records import DecodePolicy


def draw_policy(
    rng: random.Random, kind: AttentionKind = "block_causal", *, approximate: bool = True
) -> DecodePolicy:
    """Any policy; `approximate` allows the prefix and dual caches of a bidirectional model."""
    bidirectional = kind == "bidirectional"
    rule = rng.choice(["threshold", "static", "entropy_bound", "factor"])
    number = {
        "threshold": {"threshold": rng.choice([0.3, 0.6, 0.9])},
        "static": {"tokens_per_step": rng.choice([1, 2, 5])},
        "entropy_bound": {"entropy_bound": rng.choice([0.05, 0.5, 2.0])},
        "factor": {"factor": rng.choice([0.5, 1.5, 4.0])},
    }[rule]
    caches = ["exact", "none", *(["prefix", "dual"] if bidirectional and approximate else [])]
    cache = rng.choice(caches)
    edit_threshold = rng.choice([None, None, 0.2, 0.5])
    return DecodePolicy(
        kind=rule,
        block_size=rng.choice([None, 1, 3, 8, 16]) if bidirectional else rng.choice([None, BLOCK]),
        cache=cache,
        refresh_every=rng.choice([None, 1, 2, 3]) if cache in ("prefix", "dual") else None,
        edit_threshold=edit_threshold,
        max_edit_steps=16 if edit_threshold is None else rng.choice([0, 1, 3, 16]),
        max_steps_per_block=rng.choice([None, None, 1, 3]),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
        top_p=rng.choice([1.0, 0.8]),
        seed=rng.randrange(2**63),
        **number,
    )


def draw_request(
    rng: random.Random,
    name: str,
    stop: tuple[str, ...] = (),
    *,
    kind: AttentionKind = "block_causal",
    approximate: bool = True,
) -> Request:
    """A request of any policy and ending; lengths and block boundaries fall everywhere."""
    prompt = draw_prompt(rng, rng.randint(1, 40))
    max_tokens = rng.randint(1, min(30, CONTEXT - len(prompt)))
    limit = len(prompt) + max_tokens
    suffix: tuple[int, ...] = ()
    seen = kind == "bidirectional" or limit % BLOCK != 0
    if rng.random() < 0.25 and seen and limit < CONTEXT:
        suffix = draw_prompt(rng, rng.randint(1, min(12, CONTEXT - limit)))
    return Request(
        name,
        prompt,
        draw_policy(rng, kind, approximate=approximate),
        max_tokens=max_tokens,
        stop=stop,
        stop_ids=tuple(rng.sample(range(3, len(WORDS)), 3)) if rng.random() < 0.35 else (),
        suffix_ids=suffix,
        ignore_eos=rng.random() < 0.15,
    )


def draw_prompt(rng: random.Random, size: int) -> tuple[int, ...]:
    """Any token but the mask, the end of sequence among them."""
    return tuple(rng.randrange(1, len(WORDS)) for _ in range(size))


@functools.lru_cache(maxsize=4096)
def expected(request: Request, kind: AttentionKind = "block_causal", seed: int = 0) -> PlainResult:
    """What the plain loop makes of a request under the shared models; remembered, as many set-ups share requests."""
    return decode(reference_model(kind, seed), request, tokenizer=build_tokenizer())


def draw_decisive(
    rng: random.Random,
    number: int,
    kind: AttentionKind = "block_causal",
    *,
    approximate: bool = True,
    prefix: str = "",
) -> list[Request]:
    """Requests none of whose decisions hangs on rounding."""
    requests: list[Request] = []
    while len(requests) < number:
        request = draw_request(rng, f"{prefix}{len(requests)}", kind=kind, approximate=approximate)
        if expected(request, kind).decisive:
            requests.append(request)
    return requests
