"""The commit rule against a loop over positions, written from the policies' definitions."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.device import DEVICE

from fewstep.kernels.confidence import (
    NEVER,
    POLICY_KINDS,
    Candidates,
    CanvasBlock,
    Committed,
    PolicyTensors,
    commit,
    fill_after_eos,
    first_true,
)

EOS, STOP = 1, 2
KINDS = tuple(POLICY_KINDS)
HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLEMENTATIONS = ["reference"] + ["fused"] * HAS_TRITON
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton has no wheel for this system")


@dataclass(frozen=True)
class Block:
    """One sequence of the batch, as plain lists of one length."""

    tokens: list[int]
    masked: list[bool]
    generated: list[bool]
    candidates: list[int]
    confidence: list[float]
    entropy: list[float]
    kind: str
    number: float
    at_least: int
    edit_threshold: float
    allow_edit: bool
    ends: list[int]


@st.composite
def blocks(draw: st.DrawFn, width: int) -> Block:
    def column(elements: st.SearchStrategy[object]) -> list[object]:
        return draw(st.lists(elements, min_size=width, max_size=width))

    # Few distinct values, so that ties and exact thresholds are common; quarters add up without rounding.
    quarters = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
    generated = column(st.booleans())
    kind = draw(st.sampled_from(KINDS))
    return Block(
        tokens=column(st.integers(0, 4)),
        masked=[mine and mask for mine, mask in zip(generated, column(st.booleans()), strict=True)],
        generated=generated,
        candidates=column(st.integers(0, 4)),
        confidence=column(quarters),
        entropy=column(st.sampled_from([0.0, 0.25, 0.5, 1.5, 9.0])),
        kind=kind,
        number=draw(st.sampled_from([0.25, 0.5, 0.6, 1.0, 2.5, math.inf])),
        at_least=draw(st.integers(1, width + 1)),
        edit_threshold=draw(st.sampled_from([0.0, 0.5, math.inf])),
        allow_edit=draw(st.booleans()),
        ends=draw(st.sampled_from([[EOS, -1], [EOS, STOP], [-1, -1]])),
    )


def batch_of(rows: list[Block]) -> tuple[CanvasBlock, Candidates, PolicyTensors]:
    canvas = CanvasBlock(
        torch.tensor([row.tokens for row in rows]),
        torch.tensor([row.masked for row in rows]),
        torch.tensor([row.generated for row in rows]),
        torch.tensor([row.ends for row in rows]),
        EOS,
    )
    candidates = Candidates(
        torch.tensor([row.candidates for row in rows]),
        torch.tensor([row.confidence for row in rows]),
        torch.tensor([row.entropy for row in rows]),
    )
    policy = PolicyTensors(
        torch.tensor([POLICY_KINDS[row.kind] for row in rows], dtype=torch.int8),
        torch.tensor([row.number for row in rows]),
        torch.tensor([row.at_least for row in rows]),
        torch.tensor([row.edit_threshold for row in rows]),
        torch.tensor([row.allow_edit for row in rows]),
    )
    return on_device(canvas, candidates, policy)


def on_device(
    canvas: CanvasBlock, candidates: Candidates, policy: PolicyTensors
) -> tuple[CanvasBlock, Candidates, PolicyTensors]:
    return (
        CanvasBlock(*(column.to(DEVICE) for column in canvas[:4]), canvas.eos_token_id),
        Candidates(*(None if column is None else column.to(DEVICE) for column in candidates)),
        PolicyTensors(*(column.to(DEVICE) for column in policy)),
    )


def expected_open(row: Block) -> set[int]:
    candidates = [i for i, masked in enumerate(row.masked) if masked]
    score = [-e for e in row.entropy] if row.kind == "entropy_bound" else row.confidence
    best = sorted(candidates, key=lambda i: (-score[i], i))
    opened = set(best[: row.at_least])
    if row.kind == "threshold":
        opened |= {i for i in candidates if row.confidence[i] >= row.number}
    if row.kind == "entropy_bound":
        sizes = [
            n
            for n in range(1, len(best) + 1)
            if sum(row.entropy[i] for i in best[:n]) - max(row.entropy[i] for i in best[:n]) <= row.number
        ]
        opened |= set(best[: max(sizes, default=0)])
    if row.kind == "factor":
        sizes = [
            n for n in range(1, len(best) + 1) if (n + 1) * (1 - row.confidence[best[n - 1]]) < row.number
        ]
        opened |= set(best[: max(sizes, default=0)])
    return opened


def check_row(row: Block, done: Committed, n: int) -> None:
    width, opened = len(row.tokens), expected_open(row)
    edited = {
        i
        for i in range(width)
        if row.generated[i] and not row.masked[i] and row.candidates[i] != row.tokens[i]
        if row.allow_edit and row.confidence[i] > row.edit_threshold
    }
    tokens = [row.candidates[i] if i in opened | edited else row.tokens[i] for i in range(width)]
    ends = [i for i in range(width) if row.generated[i] and tokens[i] in row.ends]
    first_end = min(ends, default=NEVER)
    left = [i for i in range(width) if row.masked[i] and i not in opened]
    filled = {i for i in left if i > first_end}
    tokens = [EOS if i in filled else token for i, token in enumerate(tokens)]
    assert {i for i in range(width) if done.opened[n, i]} == opened
    assert {i for i in range(width) if done.edited[n, i]} == edited
    assert {i for i in range(width) if done.filled[n, i]} == filled
    assert done.tokens[n].tolist() == tokens
    assert done.first_end[n].item() == first_end
    assert done.first_mask[n].item() == min(set(left) - filled, default=width)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 9).flatmap(lambda width: st.lists(blocks(width), min_size=1, max_size=4)))
def test_commit_does_what_the_policies_say(impl: str, rows: list[Block]) -> None:
    done = commit(*batch_of(rows), impl=impl)
    for n, row in enumerate(rows):
        check_row(row, done, n)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_an_entropy_policy_no_entropy_is_needed(impl: str) -> None:
    canvas, candidates, policy = random_batch(8, 8, seed=0)
    by_confidence = (policy.kind != POLICY_KINDS["entropy_bound"]).nonzero()[:, 0]
    canvas, candidates, policy = rows_of(by_confidence, canvas, candidates, policy)
    expected = commit(canvas, candidates, policy, impl=impl)
    done = commit(canvas, candidates._replace(entropy=None), policy, impl=impl)
    assert all(torch.equal(*pair) for pair in zip(done, expected, strict=True))


def rows_of(
    rows: torch.Tensor, canvas: CanvasBlock, candidates: Candidates, policy: PolicyTensors
) -> tuple[CanvasBlock, Candidates, PolicyTensors]:
    return (
        CanvasBlock(*(column[rows] for column in canvas[:4]), canvas.eos_token_id),
        Candidates(*(None if column is None else column[rows] for column in candidates)),
        PolicyTensors(*(column[rows] for column in policy)),
    )


def random_batch(num: int, width: int, seed: int) -> tuple[CanvasBlock, Candidates, PolicyTensors]:
    """Realistic numbers: distinct confidences and entropies, every kind, some sequences that edit."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    generated = uniform(num, width) < 0.9
    kind = torch.arange(num) % len(POLICY_KINDS)
    return on_device(
        CanvasBlock(
            integers(50, num, width),
            generated & (uniform(num, width) < 0.6),
            generated,
            torch.tensor([[EOS, STOP, -1]]).repeat(num, 1),
            EOS,
        ),
        Candidates(integers(50, num, width), uniform(num, width), 3 * uniform(num, width) ** 4),
        PolicyTensors(
            kind.to(torch.int8),
            torch.tensor([0.7, torch.nan, 0.8, 1.3])[kind],
            1 + integers(3, num),
            torch.where(uniform(num) < 0.5, 0.8, torch.inf),
            uniform(num) < 0.7,
        ),
    )


@needs_triton
@pytest.mark.parametrize("width", [1, 5, 16, 33, 100, 256])
@pytest.mark.parametrize("entropy", [True, False])
def test_fused_gives_the_bits_of_the_reference(width: int, entropy: bool) -> None:
    canvas, candidates, policy = random_batch(16, width, seed=width)
    candidates.confidence[8:] = (candidates.confidence[8:] * 4).round() / 4
    candidates.confidence[3, 0] = candidates.entropy[2, 0] = candidates.entropy[6, -1] = torch.nan
    if not entropy:
        candidates = candidates._replace(entropy=None)
        policy = policy._replace(kind=policy.kind % 2)
    expected = commit(canvas, candidates, policy, impl="reference")
    done = commit(canvas, candidates, policy, impl="fused")
    for name, got, want in zip(Committed._fields, done, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want), name


@needs_triton
def test_fused_takes_columns_of_wider_tensors() -> None:
    canvas, candidates, policy = random_batch(6, 8, seed=1)
    wide = [torch.stack((column, column), dim=-1)[..., 0] for column in candidates]
    expected = commit(canvas, candidates, policy, impl="reference")
    done = commit(canvas, Candidates(*wide), policy, impl="fused")
    assert all(torch.equal(*pair) for pair in zip(done, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [1, 8, 33])
def test_a_batch_is_its_singles(width: int, impl: str) -> None:
    batch = random_batch(12, width, seed=width)
    together = commit(*batch, impl=impl)
    for n in range(12):
        one = torch.tensor([n], device=DEVICE)
        for whole, single in zip(together, commit(*rows_of(one, *batch), impl=impl), strict=True):
            assert torch.equal(whole[one], single)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_open_last_and_only_to_make_progress(kind: str, impl: str) -> None:
    nan = math.nan
    row = Block(
        tokens=[0] * 4,
        masked=[True] * 4,
        generated=[True] * 4,
        candidates=[3] * 4,
        confidence=[nan, 0.1, nan, 0.2],
        entropy=[nan, 2.0, nan, 1.0],
        kind=kind,
        number=0.5,
        at_least=3,
        edit_threshold=math.inf,
        allow_edit=False,
        ends=[EOS],
    )
    done = commit(*batch_of([row]), impl=impl)
    assert done.opened.tolist() == [[True, True, False, True]]


def test_fill_starts_behind_the_first_end_of_sequence() -> None:
    masked = torch.tensor([[True, False, True, True], [True, True, False, True]])
    eos = torch.tensor([[False, True, False, False], [False, False, False, False]])
    first = first_true(eos, 99)
    assert first.tolist() == [1, 99]
    assert fill_after_eos(masked, first).tolist() == [[False, False, True, True], [False] * 4]
