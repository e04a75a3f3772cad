"""The masked-row head: the reference against whole logits, tiles and kernels against float64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.device import DEVICE

from fewstep.kernels.confidence import RowStats, row_stats
from fewstep.kernels.head import head_confidence, pack_head, reference, tiled
from fewstep.kernels.linear import PackedWeight
from fewstep.kernels.norm import rms_norm

MASK = 7
# (rows asked for, hidden rows, vocabulary, width); 128 and 4,096 are the tiles of the vocabulary, 32 and 64 of the width.
SHAPES = [
    (0, 3, 50, 16),
    (1, 1, 8, 8),
    (5, 9, 300, 40),
    (33, 40, 257, 37),
    (17, 20, 128, 64),
    (3, 3, 4100, 5),
]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def picked(num_rows: int, among: int, seed: int = 0) -> torch.Tensor:
    order = torch.randperm(among, generator=torch.Generator().manual_seed(seed))
    return order[:num_rows].sort().values.to(DEVICE)


def greedy(num_rows: int) -> dict[str, torch.Tensor | None]:
    zeros, ones = torch.zeros(num_rows, device=DEVICE), torch.ones(num_rows, device=DEVICE)
    return {"temperature": zeros, "top_p": ones, "uniform": None}


def sampling(num_rows: int) -> dict[str, torch.Tensor | None]:
    """Every third row greedy, the others at temperatures between 0.2 and 2."""
    generator = torch.Generator().manual_seed(num_rows)
    temperature = 0.2 + 1.8 * torch.rand(num_rows, generator=generator)
    temperature[::3] = 0
    uniform = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    return {
        "temperature": temperature.to(DEVICE),
        "top_p": torch.ones(num_rows, device=DEVICE),
        "uniform": uniform.to(DEVICE),
    }


def exact_logits(hidden: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = hidden.double()[rows] @ weight.double().t()
    logits[:, MASK] = -torch.inf
    return logits


def assert_exact(stats: RowStats, logits: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Confidence, log-probability and entropy are those of the stated token under float64 logits."""
    logprobs = logits.log_softmax(-1)
    expected = logprobs.gather(1, stats.token[:, None])[:, 0]
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(stats.logprob.double(), expected, **close)
    torch.testing.assert_close(stats.confidence.double(), expected.exp(), **close)
    assert stats.token.dtype == torch.int64
    assert (stats.logprob.dtype, stats.confidence.dtype) == (torch.float32, torch.float32)
    if stats.entropy is not None:
        exact = torch.special.entr(logits.softmax(-1)).sum(-1)
        torch.testing.assert_close(stats.entropy.double(), exact, **close)


def assert_drawn(
    stats: RowStats, logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor
) -> None:
    """The stated tokens are where the tempered CDF crosses u, up to float32's rounding of the weights."""
    for row, (heat, u) in enumerate(zip(temperature.tolist(), uniform.tolist(), strict=True)):
        token = int(stats.token[row])
        if heat == 0:
            assert token == int(logits[row].argmax())
            continue
        cumulative = (logits[row] / heat).softmax(-1).cumsum(0)
        before = float(cumulative[token - 1]) if token else 0.0
        assert before - 1e-5 <= u < float(cumulative[token]) + 1e-5
        assert logits[row, token] > -torch.inf


def test_masked_rows_get_the_dense_head_s_statistics_in_any_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, rows = normal(0, 40, 12), normal(1, 29, 12), picked(7, 40)
    asked = sampling(7) | {"top_p": torch.full((7,), 0.9, device=DEVICE)}
    logits = (hidden @ weight.T)[rows]
    logits[:, MASK] = -torch.inf
    dense = row_stats(logits, **asked, entropy=True)
    largest, project = 0, reference.masked_logits

    def watched(hidden: torch.Tensor, chunk: torch.Tensor, *rest: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(chunk))
        return project(hidden, chunk, *rest)

    monkeypatch.setattr(reference, "masked_logits", watched)
    for max_elements, most_rows in ((1 << 20, 7), (29 * 3, 3), (1, 1)):
        largest = 0
        stats = head_confidence(
            hidden,
            rows,
            weight,
            mask_token_id=MASK,
            **asked,
            entropy=True,
            max_elements=max_elements,
            impl="reference",
        )
        assert largest == most_rows
        assert torch.equal(stats.token, dense.token)
        for got, expected in zip(stats[1:], dense[1:], strict=True):
            torch.testing.assert_close(got, expected)


IMPLEMENTATIONS = ["reference", "tiled", "fused"]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "fused":
        pytest.importorskip("triton", reason="triton has no wheel for this system")
    if request.param == "tiled" and DEVICE.type != "cpu":
        pytest.skip("the tiled head is the CPU's")
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_statistics_are_exact(impl: str, shape: tuple[int, int, int, int]) -> None:
    num_rows, among, vocabulary, width = shape
    hidden, weight, rows = normal(2, among, width), normal(3, vocabulary, width), picked(num_rows, among)
    stats = head_confidence(
        hidden, rows, weight, mask_token_id=MASK, **greedy(num_rows), entropy=True, impl=impl
    )
    logits = exact_logits(hidden, rows, weight)
    assert torch.equal(stats.token, logits.argmax(-1))
    assert_exact(stats, logits)


def test_without_a_mask_token_and_without_entropy(impl: str) -> None:
    hidden, weight, rows = normal(4, 6, 24), normal(5, 140, 24), picked(6, 6)
    stats = head_confidence(hidden, rows, weight, mask_token_id=None, **greedy(6), impl=impl)
    assert stats.entropy is None
    logits = hidden.double() @ weight.double().t()
    assert torch.equal(stats.token, logits.argmax(-1))
    assert_exact(stats, logits)


def test_ties_go_to_the_lowest_token(impl: str) -> None:
    weight = torch.zeros(4200, 4, device=DEVICE)
    # Equal best tokens within a part, within a tile and in different tiles; the mask token would be the lowest.
    weight[[MASK, 9, 10, 70, 200, 4150]] = 1.0
    hidden = torch.ones(2, 4, device=DEVICE)
    stats = head_confidence(
        hidden, picked(2, 2), weight, mask_token_id=MASK, **greedy(2), entropy=True, impl=impl
    )
    assert stats.token.tolist() == [9, 9]
    assert_exact(stats, exact_logits(hidden, picked(2, 2), weight))


def test_huge_logits_and_a_vocabulary_with_one_possible_token(impl: str) -> None:
    weight = normal(6, 300, 3)
    hidden = torch.tensor([[1e4, -2e4, 3e4], [1e-4, 0.0, 0.0]], device=DEVICE)
    stats = head_confidence(
        hidden, picked(2, 2), weight, mask_token_id=MASK, **greedy(2), entropy=True, impl=impl
    )
    logits = exact_logits(hidden, picked(2, 2), weight)
    assert torch.equal(stats.token, logits.argmax(-1))
    assert_exact(stats, logits, 2e-4)
    # Every logit but token 280's is -inf, in the last tile of three.
    certain = torch.full((300, 1), -torch.inf, device=DEVICE)
    certain[280] = 2.0
    one = torch.ones(1, 1, device=DEVICE)
    for asked in (greedy(1), sampling(1) | {"temperature": torch.ones(1, device=DEVICE)}):
        stats = head_confidence(
            one, picked(1, 1), certain, mask_token_id=MASK, **asked, entropy=True, impl=impl
        )
        assert (stats.token.tolist(), stats.confidence.tolist(), stats.entropy.tolist()) == (
            [280],
            [1.0],
            [0.0],
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["one logit", "the whole row"])
def test_unusable_logits_show_in_their_row_only(impl: str, bad: float, where: str) -> None:
    hidden, weight = normal(7, 3, 6), normal(8, 300, 6)
    if where == "one logit":
        # Only row 1 has a number in column 5, so only its logit of token 150 is spoiled.
        hidden[:, 5], weight[:, 5] = 0.0, 0.0
        hidden[1, 5], weight[150, 5] = 1.0, bad
        weight[150, :5] = 0.0
        rows, healthy = torch.tensor([1], device=DEVICE), []
    else:
        hidden[1] = bad
        rows, healthy = torch.arange(3, device=DEVICE), [0, 2]
    for asked in (
        greedy(len(rows)),
        sampling(len(rows)) | {"temperature": torch.ones(len(rows), device=DEVICE)},
    ):
        stats = head_confidence(hidden, rows, weight, mask_token_id=MASK, **asked, entropy=True, impl=impl)
        assert stats.logprob.isfinite().nonzero()[:, 0].tolist() == healthy
        assert ((stats.token >= 0) & (stats.token < 300)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_draw_crosses_the_tempered_distribution(impl: str, shape: tuple[int, int, int, int]) -> None:
    num_rows, among, vocabulary, width = shape
    hidden, weight, rows = normal(9, among, width), normal(10, vocabulary, width), picked(num_rows, among)
    asked = sampling(num_rows)
    stats = head_confidence(hidden, rows, weight, mask_token_id=MASK, **asked, entropy=True, impl=impl)
    logits = exact_logits(hidden, rows, weight)
    assert_exact(stats, logits)
    assert_drawn(stats, logits, asked["temperature"], asked["uniform"])


def test_rows_and_settings_need_not_be_contiguous(impl: str) -> None:
    hidden, weight, rows = normal(9, 12, 40), normal(10, 300, 40), picked(6, 12)
    asked = {"temperature": torch.tensor([0.7], device=DEVICE), "uniform": sampling(1)["uniform"]}
    ones = torch.ones(6, device=DEVICE)
    wide = {name: value.expand(6) for name, value in asked.items()}
    whole = {name: value.contiguous() for name, value in wide.items()}
    every_other = torch.stack((rows, torch.zeros_like(rows)), dim=1)[:, 0]
    got, expected = (
        head_confidence(hidden, where, weight, mask_token_id=MASK, top_p=ones, **settings, impl=impl)
        for where, settings in ((every_other, wide), (rows, whole))
    )
    assert torch.equal(got.token, expected.token)
    assert torch.equal(got.logprob, expected.logprob)


def test_the_ends_of_the_distribution_draw_a_possible_token(impl: str) -> None:
    weight = torch.full((260, 1), -torch.inf, device=DEVICE)
    # Probability in the middle of a part only: both ends of u must come out of it, not beside it.
    weight[[140, 141, 143]] = 0.5
    ends = torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64, device=DEVICE)
    ones = torch.ones(2, device=DEVICE)
    stats = head_confidence(
        torch.ones(2, 1, device=DEVICE),
        torch.arange(2, device=DEVICE),
        weight,
        mask_token_id=MASK,
        temperature=ones,
        top_p=ones,
        uniform=ends,
        impl=impl,
    )
    assert stats.token.tolist() == [140, 143]


def test_a_nucleus_row_among_others_draws_from_its_nucleus(impl: str) -> None:
    hidden, weight, rows = normal(11, 30, 8), normal(12, 150, 8), picked(30, 30)
    asked = sampling(30) | {"top_p": torch.tensor([1.0, 0.3, 0.7] * 10, device=DEVICE)}
    expected = row_stats(exact_logits(hidden, rows, weight).float(), **asked)
    stats = head_confidence(hidden, rows, weight, mask_token_id=MASK, **asked, impl=impl)
    assert torch.equal(stats.token, expected.token)
    torch.testing.assert_close(stats.logprob, expected.logprob, rtol=1e-4, atol=1e-4)
    free = head_confidence(
        hidden,
        rows,
        weight,
        mask_token_id=MASK,
        **(asked | {"top_p": torch.ones(30, device=DEVICE)}),
        impl=impl,
    )
    assert (free.token != stats.token).any(), "no row of this test is touched by its nucleus"


def test_the_final_norm_may_be_left_to_the_head(impl: str) -> None:
    hidden, weight, gain, rows = normal(13, 12, 40) * 5, normal(14, 200, 40), normal(15, 40), picked(5, 12)
    stats = head_confidence(
        hidden,
        rows,
        weight,
        mask_token_id=MASK,
        **greedy(5),
        norm_weight=gain,
        norm_eps=1e-5,
        entropy=True,
        impl=impl,
    )
    normed = rms_norm(hidden.double(), gain.double(), 1e-5, impl="reference")
    logits = exact_logits(normed, rows, weight)
    assert torch.equal(stats.token, logits.argmax(-1))
    assert_exact(stats, logits)


def test_bfloat16_weights_give_float32_statistics(impl: str) -> None:
    hidden, weight, rows = (normal(16, 9, 64) / 8).bfloat16(), normal(17, 300, 64).bfloat16(), picked(9, 9)
    stats = head_confidence(hidden, rows, weight, mask_token_id=MASK, **greedy(9), entropy=True, impl=impl)
    # The CPU's matrix product rounds a logit to bfloat16, up to 4 here, by 2**-8; the kernel keeps float32.
    assert_exact(stats, exact_logits(hidden, rows, weight), 1e-5 if impl == "fused" else 2**-5)


def test_a_large_vocabulary_is_tiled_on_the_cpu_and_a_small_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(
        tiled, "head_confidence", lambda *arguments: calls.append(arguments) or reference.head_confidence
    )
    for num_rows, vocabulary, asked, used in (
        (128, 1 << 14, greedy(128), 1),
        (127, 1 << 14, greedy(127), 0),
        (128, 1 << 14, sampling(128), 1),
        (4096, 336, greedy(4096), 0),
    ):
        calls.clear()
        hidden, weight = torch.zeros(num_rows, 2), torch.zeros(vocabulary, 2)
        on_cpu = {name: None if value is None else value.cpu() for name, value in asked.items()}
        head_confidence(hidden, torch.arange(num_rows), weight, mask_token_id=0, **on_cpu)
        assert len(calls) == used


@pytest.mark.parametrize("asked", [greedy(50), sampling(50)], ids=["greedy", "sampling"])
def test_tiles_and_whole_rows_agree_on_every_token(asked: dict[str, torch.Tensor | None]) -> None:
    hidden, weight = normal(18, 50, 32).cpu() / 4, normal(19, 3 * tiled.TILE + 2001, 32).cpu()
    on_cpu = {name: None if value is None else value.cpu() for name, value in asked.items()}
    mask = 2 * tiled.TILE
    tiles, whole = (
        head_confidence(
            hidden, torch.arange(50), weight, mask_token_id=mask, **on_cpu, entropy=True, impl=kind
        )
        for kind in ("tiled", "reference")
    )
    assert torch.equal(tiles.token, whole.token)
    assert len({int(token) // tiled.TILE for token in tiles.token}) == 4, (
        "a tile of this test is never chosen"
    )
    for got, expected in zip(tiles[1:], whole[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    not PackedWeight.supported(torch.empty(1, 1, dtype=torch.bfloat16)),
    reason="oneDNN has no bfloat16 products on this CPU",
)
@pytest.mark.parametrize("asked", [greedy(20), sampling(20)], ids=["greedy", "sampling"])
def test_a_packed_head_is_the_head(asked: dict[str, torch.Tensor | None]) -> None:
    hidden = (normal(20, 20, 32).cpu() / 4).bfloat16()
    weight = normal(21, tiled.MIN_VOCABULARY + 9, 32).cpu().bfloat16()
    packed = pack_head(weight)
    assert packed is not None
    assert pack_head(weight[: tiled.MIN_VOCABULARY - 1]) is None
    on_cpu = {name: None if value is None else value.cpu() for name, value in asked.items()}
    stats = head_confidence(
        hidden, torch.arange(20), weight, mask_token_id=MASK, **on_cpu, entropy=True, packed=packed
    )
    # bfloat16 logits of up to 8 are rounded by 2**-6.
    assert_exact(stats, exact_logits(hidden, torch.arange(20), weight), 2**-4)
