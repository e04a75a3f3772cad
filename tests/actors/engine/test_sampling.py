"""Gate 3: a seed decides the text, whatever the batch; and what is sampled has exactly the distribution it should.

Caught here when put into the engine on purpose: one uniform shared by a block's positions or by its steps; a draw
keyed by batch index or forward count; temperature or top-p left out, applied twice or to the confidence.
"""

from __future__ import annotations

import collections
import random

import pytest
from tests.actors.engine.reference import models
from tests.actors.engine.reference.compare import assert_equal, drain, result
from tests.actors.engine.reference.models import VERSION, build_minute_model, build_tokenizer, engine_of
from tests.actors.engine.reference.outcomes import Outcomes, chi_square, outcome_probabilities
from tests.actors.engine.reference.requests import draw_request

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.platform.records import DecodePolicy, Trajectory
from fewstep.platform.rng import derive_seed

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

VOCABULARY = 6
NUM_DRAWS = 3000
POLICIES = {
    "one by one": DecodePolicy(kind="static", temperature=1.0),
    "two at a time, hot": DecodePolicy(kind="static", tokens_per_step=2, temperature=1.6),
    "cool": DecodePolicy(kind="static", tokens_per_step=3, temperature=0.6),
    "nucleus": DecodePolicy(threshold=0.5, temperature=1.3, top_p=0.7),
    "entropy bound": DecodePolicy(kind="entropy_bound", entropy_bound=1.0, temperature=1.0),
    "factor": DecodePolicy(kind="factor", factor=1.2, temperature=1.0, top_p=0.9),
    "editing": DecodePolicy(threshold=0.2, temperature=2.0, edit_threshold=0.1, max_edit_steps=1),
    "forced open": DecodePolicy(kind="static", temperature=1.2, max_steps_per_block=2),
}


def sample(policy: DecodePolicy, number: int) -> collections.Counter[tuple[int, ...]]:
    """Completions under `number` seeds, many of them in every forward."""
    engine = Engine(
        build_minute_model(vocab_size=VOCABULARY),
        build_tokenizer(VOCABULARY),
        max_sequences=100,
        weight_version=VERSION,
        static_steps=models.STATIC_STEPS,
    )
    requests = [
        Request(str(i), (3,), policy.model_copy(update={"seed": derive_seed("sampling", i)}), max_tokens=3)
        for i in range(number)
    ]
    return collections.Counter(tuple(t.completion_ids.tolist()) for t in engine.generate(requests))


def exact(policy: DecodePolicy) -> Outcomes:
    return outcome_probabilities(
        build_minute_model(vocab_size=VOCABULARY), Request("a", (3,), policy, max_tokens=3)
    )


@pytest.mark.parametrize("name", POLICIES)
def test_completions_have_their_exact_distribution(name: str) -> None:
    outcomes = exact(POLICIES[name])
    # Three positions at once: a draw that depended on another position's would show, not only a wrong marginal.
    assert len(outcomes) > 8
    assert max(outcomes.values()) < 0.6
    counts = sample(POLICIES[name], NUM_DRAWS)
    assert set(counts) <= set(outcomes)
    statistic, critical = chi_square(counts, outcomes)
    assert statistic < critical


def test_the_statistic_sees_a_temperature_or_nucleus_that_is_slightly_off() -> None:
    counts = sample(POLICIES["nucleus"], NUM_DRAWS)
    for change in ({"temperature": 1.15}, {"top_p": 0.75}, {"threshold": 0.4}):
        statistic, critical = chi_square(counts, exact(POLICIES["nucleus"].model_copy(update=change)))
        assert statistic > critical, change


def with_seed(seed: int) -> Request:
    policy = DecodePolicy(temperature=1.3, seed=seed)
    return Request(f"seed{seed}", (5, 6, 7), policy, max_tokens=40, ignore_eos=True)


@pytest.mark.parametrize("kind", ["block_causal", "bidirectional"])
def test_a_seed_draws_the_same_in_any_batch_and_another_draws_differently(kind: str) -> None:
    rng = random.Random(3)

    def among(number: int) -> list[Trajectory]:
        engine = engine_of(max_sequences=6, kind=kind)
        requests = [draw_request(rng, f"other{i}", kind=kind) for i in range(number)]
        requests += [with_seed(1), with_seed(2)]
        rng.shuffle(requests)
        for request in requests:
            engine.add(request)
            engine.step()
        updates = drain(engine)
        return [result(updates, with_seed(seed)) for seed in (1, 2)]

    first, second = among(0)
    assert first.canvas_ids.tolist() != second.canvas_ids.tolist()
    for number in (1, 5, 11):
        for one, other in zip(among(number), (first, second), strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("temperature", [1e-3, 2.0])
def test_extreme_temperatures(temperature: float) -> None:
    policy = DecodePolicy(kind="static", temperature=temperature, seed=4)
    request = Request("a", (5, 6, 7), policy, max_tokens=30, ignore_eos=True)
    greedy = Request("a", (5, 6, 7), DecodePolicy(kind="static"), max_tokens=30, ignore_eos=True)
    hot, cold = engine_of().generate([request])[0], engine_of().generate([greedy])[0]
    assert (hot.canvas_ids.tolist() == cold.canvas_ids.tolist()) == (temperature < 1)
