"""The two forward processes against the method's formulas."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.kernels.rows import NO_TARGET, SampleRows
from fewstep.pipelines import corruption
from fewstep.pipelines.corruption import (
    EDIT_RATE_CAP,
    MAX_WEIGHT,
    Sample,
    edit_state,
    mask_states,
)
from fewstep.platform.rng import generator

MASK, EOS, BLOCK = 2, 1, 8
VOCABULARY = np.arange(10, 40)


def _sample(num_prompt: int = 5, length: int = 29) -> Sample:
    return Sample.padded(np.arange(100, 100 + length), num_prompt, BLOCK, EOS)


def _masked(seed: int, block_size: int = BLOCK, **changes: object) -> tuple[Sample, SampleRows]:
    sample = Sample.padded(np.arange(100, 129), 5, block_size, EOS)
    rows = SampleRows.clean(sample.tokens)
    options = {"rates": (0.1, 1.0), "complementary": True} | changes
    mask_states(sample, rows, block_size=block_size, mask_token=MASK, draws=generator("m", seed), **options)  # type: ignore[arg-type]
    return sample, rows


def test_samples_are_filled_to_whole_blocks_with_end_of_sequence() -> None:
    sample = _sample()
    assert len(sample.tokens) == 32
    assert (sample.tokens[29:] == EOS).all()


@pytest.mark.parametrize("seed", range(20))
def test_complementary_states_supervise_every_answer_token_once(seed: int) -> None:
    sample, rows = _masked(seed)
    supervised = rows.positions[rows.targets != NO_TARGET]
    assert sorted(supervised) == list(range(sample.num_prompt, len(sample.tokens)))
    at = rows.targets != NO_TARGET
    assert (rows.tokens[at] == MASK).all()
    assert (rows.targets[at] == sample.tokens[rows.positions[at]]).all()


@pytest.mark.parametrize("seed", range(20))
def test_prompt_is_never_masked_and_never_supervised(seed: int) -> None:
    sample, rows = _masked(seed)
    prompt = rows.positions < sample.num_prompt
    assert (rows.tokens[prompt] == sample.tokens[rows.positions[prompt]]).all()
    assert (rows.targets[prompt] == NO_TARGET).all()


@pytest.mark.parametrize("seed", range(20))
def test_every_block_has_a_mask_in_the_first_state(seed: int) -> None:
    _, rows = _masked(seed, rates=(0.0, 1.0))
    first = rows.copies == 1
    blocks = rows.positions[first] // BLOCK
    masked = rows.tokens[first] == MASK
    assert set(blocks[masked]) == set(blocks)


def test_weights_integrate_to_one_over_t() -> None:
    """E over t ~ U(0.25, 1) of weight · masked share is the average of t · 1/t = 1 for every position."""
    total = np.zeros(32)
    for seed in range(2000):
        _, rows = _masked(seed, rates=(0.25, 1.0), complementary=False)
        np.add.at(total, rows.positions, rows.weights)
    assert np.allclose(total[5:] / 2000, 1.0, atol=0.12)


def test_weights_are_clipped() -> None:
    assert max(_masked(seed)[1].weights.max() for seed in range(50)) == pytest.approx(MAX_WEIGHT)


def test_block_size_one_masks_everything_once() -> None:
    sample, rows = _masked(0, block_size=1)
    assert rows.copies.max() == 1
    assert (rows.tokens[rows.copies == 1] == MASK).sum() == len(sample.tokens) - sample.num_prompt


def test_edits_stay_under_the_cap_and_inside_their_block() -> None:
    sample = _sample(length=61)
    num_edited = []
    for seed in range(200):
        rows = SampleRows.clean(sample.tokens)
        edit_state(sample, rows, block_size=BLOCK, vocabulary=VOCABULARY, draws=generator("e", seed))
        edited = rows.copies == 1
        assert edited.sum() == len(sample.tokens) - sample.num_prompt // BLOCK * BLOCK
        changed = rows.tokens[edited] != sample.tokens[rows.positions[edited]]
        blocks_changed = len(np.unique(rows.positions[edited][changed] // BLOCK))
        assert blocks_changed <= EDIT_RATE_CAP * (len(sample.tokens) - sample.num_prompt)
        assert not changed[rows.positions[edited] < sample.num_prompt].any()
        answer = rows.positions[edited] >= sample.num_prompt
        assert (rows.targets[edited][answer] == sample.tokens[rows.positions[edited][answer]]).all()
        num_edited.append(changed.sum())
    assert 0 in num_edited
    assert max(num_edited) > 4


def _distance(first: np.ndarray, second: np.ndarray, free_end: bool) -> int:
    """Levenshtein distance in tokens; `free_end`: what one of the two has left over at its end costs nothing."""
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    table[:, 0], table[0] = np.arange(len(first) + 1), np.arange(len(second) + 1)
    for row, one in enumerate(first, start=1):
        for column, other in enumerate(second, start=1):
            table[row, column] = min(
                table[row - 1, column] + 1,
                table[row, column - 1] + 1,
                table[row - 1, column - 1] + int(one != other),
            )
    return int(min(table[-1].min(), table[:, -1].min()) if free_end else table[-1, -1])


def _edits_and_distance(seed: int, free_end: bool) -> tuple[int, int]:
    """The k of one draw (Seed Diffusion, 2508.02193, eq. 4) and how far the state is from the text, summed over blocks."""
    sample = _sample(length=61)
    rows = SampleRows.clean(sample.tokens)
    edit_state(sample, rows, block_size=BLOCK, vocabulary=VOCABULARY, draws=generator("k", seed))
    state, positions = rows.tokens[rows.copies == 1], rows.positions[rows.copies == 1]
    budget = int((positions >= sample.num_prompt).sum() * generator("k", seed).uniform(0.0, EDIT_RATE_CAP))
    blocks = [np.flatnonzero(positions // BLOCK == block) for block in np.unique(positions // BLOCK)]
    return budget, sum(_distance(state[at], sample.tokens[positions[at]], free_end) for at in blocks)


def test_states_are_no_further_from_the_text_than_their_number_of_edits() -> None:
    """An insertion pushes a token out of its block, a deletion pulls one in: what that adds is restoring the length, not
    an edit, and it at most doubles the distance (docs/decisions/0018-edit-length.md)."""
    edits = [_edits_and_distance(seed, free_end=True) for seed in range(200)]
    assert max(budget for budget, _ in edits) >= 5
    assert sum(distance for _, distance in edits) <= sum(budget for budget, _ in edits)
    whole = [_edits_and_distance(seed, free_end=False) for seed in range(200)]
    assert all(distance <= 2 * budget for budget, distance in whole)


def test_substitutions_are_as_many_as_their_number_of_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruption, "EDIT_PROBABILITIES", (1.0, 0.0, 0.0))
    found = [_edits_and_distance(seed, free_end=False) for seed in range(200)]
    assert all(distance <= budget for budget, distance in found)
    assert np.mean([distance == budget for budget, distance in found]) > 0.9
