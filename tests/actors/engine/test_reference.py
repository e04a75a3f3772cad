"""The judge is judged: hand-made cases of every rule of the plain loop, and proof that its models are no dead weight."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from tests.actors.engine.reference.attention import Window, block_causal_logits
from tests.actors.engine.reference.loop import Block, Canvas, PlainResult
from tests.actors.engine.reference.models import EOS, MASK, WORDS, build_minute_model, reference_model
from tests.actors.engine.reference.outcomes import chi_square, outcome_probabilities
from tests.actors.engine.reference.policy import Candidate, candidate, num_open, opens
from tests.actors.engine.reference.requests import draw_request, expected
from tests.actors.engine.reference.text import certain_stop

from fewstep.actors.engine.request import Request
from fewstep.kernels.attention import visibility
from fewstep.kernels.model.transformer import masked_attention
from fewstep.platform.records import DecodePolicy

KINDS = ("block_causal", "bidirectional")


def sure(token: int, confidence: float, entropy: float = 0.0) -> Candidate:
    return Candidate(token, math.log(confidence), entropy, math.inf)


@pytest.mark.parametrize(
    ("policy", "score", "number"),
    [
        ({"kind": "threshold", "threshold": 0.8}, [0.9, 0.8, 0.7], 2),
        ({"kind": "threshold", "threshold": 0.8}, [0.3, 0.2], 1),
        ({"kind": "static", "tokens_per_step": 2}, [0.9, 0.8, 0.7], 2),
        ({"kind": "static", "tokens_per_step": 5}, [0.9, 0.8], 2),
        # (n + 1)(1 - c): 2 * 0.1 = 0.2, 3 * 0.2 = 0.6, 4 * 0.3 = 1.2.
        ({"kind": "factor", "factor": 1.0}, [0.9, 0.8, 0.7], 2),
        ({"kind": "factor", "factor": 0.1}, [0.9, 0.8, 0.7], 1),
        ({"kind": "factor", "factor": 1.3}, [0.9, 0.8, 0.7], 3),
        # Entropies 0.2, 0.3, 0.4: without the largest they add up to 0, 0.2, 0.5.
        ({"kind": "entropy_bound", "entropy_bound": 0.4}, [-0.2, -0.3, -0.4], 2),
        ({"kind": "entropy_bound", "entropy_bound": 0.6}, [-0.2, -0.3, -0.4], 3),
        ({"kind": "entropy_bound", "entropy_bound": 0.0}, [-0.2, -0.3, -0.4], 1),
    ],
)
def test_how_many_positions_each_policy_opens(
    policy: dict[str, float], score: list[float], number: int
) -> None:
    assert num_open(score, DecodePolicy(**policy))[0] == number


def test_the_surest_open_first_and_ties_from_left_to_right() -> None:
    policy = DecodePolicy(kind="static", tokens_per_step=2)
    found = {4: sure(3, 0.5), 5: sure(3, 0.9), 6: sure(3, 0.5)}
    assert opens(found, policy, last_chance=False)[0] == [5, 4]
    assert opens(found, policy, last_chance=True)[0] == [5, 4, 6]
    by_entropy = DecodePolicy(kind="entropy_bound", entropy_bound=0.0)
    found = {4: sure(3, 0.9, entropy=0.7), 5: sure(3, 0.1, entropy=0.6)}
    assert opens(found, by_entropy, last_chance=False)[0] == [5]


def test_a_draw_is_tempered_cut_and_keyed() -> None:
    logits = torch.tensor([-math.inf, 0.0, math.log(2.0), math.log(4.0)])
    greedy = candidate(logits, DecodePolicy(), 0, 0)
    assert (greedy.token, round(greedy.confidence, 6)) == (3, round(4 / 7, 6))
    assert greedy.entropy == pytest.approx(-sum(p / 7 * math.log(p / 7) for p in (1, 2, 4)))
    # At temperature 1/2 the odds square to 1 : 4 : 16, and the nucleus of 0.8 keeps the last two.
    hot = DecodePolicy(temperature=0.5, seed=3)
    drawn = [candidate(logits, hot, position, 0).token for position in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0, 1 / 21, 4 / 21, 16 / 21], atol=0.02)
    cut = DecodePolicy(temperature=0.5, top_p=0.8, seed=3)
    drawn = [candidate(logits, cut, 0, step).token for step in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0, 0, 0.2, 0.8], atol=0.02)
    # Whatever the draw's temperature, confidence is the model's own probability.
    assert candidate(logits, cut, 0, 0).confidence in (pytest.approx(2 / 7), pytest.approx(4 / 7))


def block_of(tokens: list[int], **policy: object) -> Block:
    """A live block over positions 2 to 5 behind a prompt of two tokens."""
    canvas = Canvas.of((7, 7), 4, MASK, ())
    canvas.tokens[2:] = tokens
    canvas.step_map[2:] = [-1 if token == MASK else 0 for token in tokens]
    return Block(canvas, range(2, 6), DecodePolicy(**policy), MASK, frozenset((EOS, 9)), EOS)


def test_masks_behind_an_end_are_filled_with_the_end_of_sequence() -> None:
    for end in (EOS, 9):
        block = block_of([MASK, MASK, MASK, 5], threshold=0.8)
        block.forward({2: sure(4, 0.1), 3: sure(end, 0.9), 4: sure(6, 0.7)}, step=3)
        assert block.canvas.tokens[2:] == [MASK, end, EOS, 5]
        assert block.canvas.step_map[2:] == [-1, 3, 3, 0]
        assert math.isnan(block.canvas.logprob[4])
        assert not block.over


def test_an_edit_replaces_what_is_not_behind_an_end() -> None:
    block = block_of([4, EOS, EOS, MASK], threshold=0.9, edit_threshold=0.5)
    assert (block.editable, block.masked) == ([2, 3], [5])
    block.forward({2: sure(5, 0.5), 3: sure(6, 0.51), 5: sure(8, 0.2)}, step=1)
    # 0.5 is not above the threshold; with the first end gone the second one is the first.
    assert block.canvas.tokens[2:] == [4, 6, EOS, 8]
    assert block.canvas.edits == [(3, 0, EOS, pytest.approx(math.nan, nan_ok=True))]
    assert block.editable == [2, 3, 4]
    assert not block.over
    block.forward({2: sure(4, 0.9), 3: sure(6, 0.9), 4: sure(EOS, 0.9)}, step=2)
    assert block.over


def test_edit_only_forwards_are_bounded_and_unlimited_forwards_open_everything() -> None:
    block = block_of([MASK, MASK, 4, 5], threshold=0.9, edit_threshold=0.5, max_edit_steps=2)
    block.policy = block.policy.model_copy(update={"max_steps_per_block": 2})
    for step, token in enumerate((6, 7)):
        block.forward({p: sure(token, 0.6 - 0.1 * (p < 4)) for p in range(2, 6)}, step)
    assert block.masked == []
    assert (block.num_opening, block.over) == (2, False)
    block.forward({p: sure(8, 0.6) for p in range(2, 6)}, 2)
    assert not block.over
    block.forward({p: sure(10, 0.6) for p in range(2, 6)}, 3)
    assert (block.num_edit_only, block.over) == (2, True)


def test_where_a_stop_string_cuts_and_when_that_is_certain() -> None:
    assert certain_stop("abcd", ("bc", "d"), last=False) == 1
    assert certain_stop("abcd", ("x",), last=True) is None
    # "ab…" may yet become "abcde", which begins before "c"; at the end it cannot.
    assert certain_stop("abcd", ("c", "abcde"), last=False) is None
    assert certain_stop("abcd", ("c", "abcde"), last=True) == 2


def test_plain_attention_agrees_with_the_trainers() -> None:
    model = reference_model()
    tokens = [int(token) for token in np.random.default_rng(0).integers(1, len(WORDS), 27)]
    positions = torch.arange(27)[None]
    visible = visibility(positions, torch.zeros_like(positions), model.config.block_size)
    with torch.no_grad():
        hidden = model(torch.tensor([tokens]), positions, masked_attention(visible))
        torch.testing.assert_close(
            block_causal_logits(model, tokens), model.logits(hidden)[0], atol=1e-4, rtol=0
        )


def test_a_partial_forward_is_exact_while_nothing_changed_and_stale_afterwards() -> None:
    model = reference_model("bidirectional")
    tokens = [4, 5, 6, MASK, MASK, MASK, MASK, 7]
    window = Window()
    whole = window.logits(model, tokens, 0, 8)
    for first, end in ((3, 5), (3, 8)):
        part = window.logits(model, tokens, first, end)
        torch.testing.assert_close(part[first:end], whole[first:end], atol=1e-4, rtol=0)
        assert part[:first].isnan().all()
        assert part[end:].isnan().all()
    tokens[3] = 9
    exact = Window().logits(model, tokens, 0, 8)[4]
    assert (window.logits(model, tokens, 3, 5)[4] - exact)[1:].abs().max() > 1e-3


def test_outcome_probabilities_add_up_and_the_test_statistic_tells_them_apart() -> None:
    model = build_minute_model(vocab_size=6)
    one, other = (
        outcome_probabilities(
            model, Request("a", (3,), DecodePolicy(kind="static", temperature=temperature), max_tokens=3)
        )
        for temperature in (1.0, 1.2)
    )
    assert sum(one.values()) == pytest.approx(1.0)
    draws = np.random.default_rng(0).multinomial(3000, list(one.values()))
    counts = dict(zip(one, draws.tolist(), strict=True))
    statistic, critical = chi_square(counts, one)
    assert statistic < critical
    statistic, critical = chi_square(counts, other)
    assert statistic > critical


@pytest.fixture(scope="module", params=KINDS)
def sample(request: pytest.FixtureRequest) -> list[tuple[Request, PlainResult]]:
    rng = random.Random(1)
    drawn = [draw_request(rng, str(i), kind=request.param) for i in range(150)]
    return [(one, expected(one, request.param)) for one in drawn]


def test_random_models_behave_like_models(sample: list[tuple[Request, PlainResult]]) -> None:
    """Otherwise agreement would mean little: every path that the gates compare is taken often."""
    results = [result for _, result in sample]
    confidence = np.exp([value for result in results for value in result.logprob if not math.isnan(value)])
    low, middle, high = np.quantile(confidence, (0.1, 0.5, 0.9))
    assert low < 0.4 < middle < 0.8 < high
    assert 0.1 < np.mean([result.finish_reason == "stop" for result in results]) < 0.9
    edits = [edit for result in results for edit in result.edits]
    assert len(edits) > 200
    # Ends of sequence are written over like other tokens.
    assert any(token == EOS and not math.isnan(value) for _, _, token, value in edits)
    assert sum(result.num_edit_only for result in results) > 100
    assert sum(result.num_blocks > 1 for result in results) > 50
    filled = sum(
        step >= 0 and math.isnan(value)
        for result in results
        for step, value in zip(result.step_map, result.logprob, strict=True)
    )
    assert filled > 20
    tokens = np.bincount([token for result in results for token in result.canvas], minlength=len(WORDS))
    assert (tokens[2:] > 0).mean() > 0.8
    assert tokens[2:].max() < tokens[2:].sum() / 3
    # A forward opens neither always one position nor always all.
    per_forward = sum(result.num_tokens for result in results) / sum(result.forwards for result in results)
    assert 1.05 < per_forward < 4
    # Few decisions hang on rounding.
    assert np.mean([result.decisive for result in results]) > 0.9


def test_neighbours_differ_and_a_token_far_back_matters(sample: list[tuple[Request, PlainResult]]) -> None:
    pairs = [
        (a, b) for _, result in sample for a, b in itertools.pairwise(result.canvas) if MASK not in (a, b)
    ]
    assert np.mean([a != b for a, b in pairs]) > 0.5
    kind = "bidirectional" if len(sample[0][1].canvas) == sample[0][0].max_tokens else "block_causal"
    changed = []
    for request, result in sample[:40]:
        other = dataclasses.replace(
            request, prompt_ids=(request.prompt_ids[0] % 30 + 1, *request.prompt_ids[1:])
        )
        changed.append(expected(other, kind).canvas != result.canvas)
    assert np.mean(changed) > 0.7
