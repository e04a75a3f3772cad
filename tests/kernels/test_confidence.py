"""Row statistics and keyed draws, each against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.kernels.confidence import keyed_uniform, row_stats
from fewstep.platform.rng import derive_seed

INTEGERS = st.integers(0, 2**63 - 1)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.tuples(INTEGERS, st.integers(0, 2**20), st.integers(0, 2**15)), min_size=1, max_size=8))
def test_keyed_uniform_is_the_platform_hash(keys: list[tuple[int, int, int]]) -> None:
    seed, position, step = (torch.tensor(column) for column in zip(*keys, strict=True))
    expected = [((derive_seed(*key) >> 31) + 0.5) / 2**32 for key in keys]
    assert keyed_uniform(seed, position, step).tolist() == expected


def test_keyed_uniform_is_uniform_and_uncorrelated_along_each_axis() -> None:
    seed, position, step = torch.arange(64)[:, None, None], torch.arange(64)[:, None], torch.arange(64)
    draws = keyed_uniform(seed, position, step).numpy()
    counts = np.histogram(draws, bins=64, range=(0, 1))[0]
    # chi-square of 63 degrees: mean 63, standard deviation 11.2; 120 is five of them away.
    assert ((counts - 4096) ** 2 / 4096).sum() < 120
    for axis in range(3):
        left, right = draws.take(range(63), axis).ravel(), draws.take(range(1, 64), axis).ravel()
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(left.size)


def test_greedy_takes_the_best_token_and_its_probability() -> None:
    logits = normal(0, 50, 33)
    stats = row_stats(logits, torch.zeros(50), torch.ones(50), None)
    assert torch.equal(stats.token, logits.argmax(-1))
    torch.testing.assert_close(stats.confidence, logits.softmax(-1).amax(-1))
    torch.testing.assert_close(stats.logprob, logits.log_softmax(-1).amax(-1))


def test_confidence_of_a_draw_is_untempered() -> None:
    logits, rows = normal(1, 200, 33), torch.arange(200)
    uniform = keyed_uniform(torch.tensor(5), rows, torch.tensor(0))
    stats = row_stats(logits, torch.full((200,), 1.7), torch.ones(200), uniform)
    expected = logits.softmax(-1)[rows, stats.token]
    torch.testing.assert_close(stats.confidence, expected)
    assert (stats.token != logits.argmax(-1)).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_draws_follow_the_tempered_nucleus(temperature: float, top_p: float) -> None:
    num_draws = 200_000
    logits = normal(2, 8)
    weight = (logits / temperature).softmax(-1).double()
    if top_p < 1:
        order = weight.argsort(descending=True)
        before = weight[order].cumsum(0) - weight[order]
        weight[order[before >= top_p]] = 0
        weight /= weight.sum()
        assert (weight == 0).any()
    uniform = keyed_uniform(torch.tensor(9), torch.arange(num_draws), torch.tensor(3))
    full = torch.full((num_draws,), 1.0)
    stats = row_stats(logits.expand(num_draws, -1), full * temperature, full * top_p, uniform)
    share = torch.bincount(stats.token, minlength=8) / num_draws
    # Five standard deviations of a share of 200,000 draws.
    assert (share - weight).abs().max() < 5 * 0.5 / num_draws**0.5
    assert (share[weight == 0] == 0).all()


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = torch.zeros(20_000, 4)
    logits[:, [0, 3]] = -torch.inf
    full = torch.ones(20_000)
    uniform = torch.linspace(2.0**-33, 1 - 2.0**-33, 20_000, dtype=torch.float64)
    tokens = row_stats(logits, full, full, uniform).token
    assert set(tokens.tolist()) == {1, 2}


def test_a_row_draws_the_same_beside_any_neighbour() -> None:
    logits = normal(3, 64, 40)
    temperature = torch.tensor([0.0, 0.5, 1.0, 1.9]).repeat(16)
    top_p = torch.tensor([1.0, 0.5, 0.9, 1.0]).repeat_interleave(16)
    uniform = keyed_uniform(torch.arange(64), torch.tensor(1), torch.tensor(2))
    together = row_stats(logits, temperature, top_p, uniform)
    for i in range(64):
        one = slice(i, i + 1)
        alone = row_stats(logits[one], temperature[one], top_p[one], uniform[one])
        assert [int(x) for x in alone.token] == [int(together.token[i])]
        assert alone.logprob.item() == together.logprob[i].item()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_show_in_their_row_only(bad: float, temperature: float) -> None:
    logits = normal(4, 3, 10)
    logits[1, 4] = bad
    stats = row_stats(logits, torch.full((3,), temperature), torch.ones(3), torch.full((3,), 0.5).double())
    assert stats.logprob.isfinite().tolist() == [True, False, True]
    assert ((stats.token >= 0) & (stats.token < 10)).all()
