"""Log-probability and entropy of a linear head: chunks and kernels against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.device import DEVICE

from fewstep.kernels.loss import holds_logits, linear_logprob

MASK = 7
# (rows, vocabulary, width); the kernels' tiles are 128 tokens and 32 or 64 numbers wide.
SHAPES = [(0, 50, 16), (1, 8, 1), (7, 300, 40), (33, 257, 37), (130, 128, 64)]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def inputs(num_rows: int, vocabulary: int, width: int) -> tuple[torch.Tensor, ...]:
    targets = torch.randint(vocabulary, (num_rows,), generator=torch.Generator().manual_seed(num_rows))
    targets[targets == MASK] = 0
    return normal(1, num_rows, width), normal(2, vocabulary, width), targets.to(DEVICE)


def with_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    grads: tuple[float, float] = (1.0, 1.0),
    mask_token_id: int | None = MASK,
    **how: object,
) -> list[torch.Tensor]:
    """logprob, entropy and the gradients of a weighted sum of both."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    outputs = linear_logprob(*leaves, targets, mask_token_id=mask_token_id, **how)
    mixed = [scale * normal(3 + i, len(targets)).to(outputs[0].dtype) for i, scale in enumerate(grads)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, mixed)]


def assert_equal(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for actual, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["chunked", "fused"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "fused":
        pytest.importorskip("triton", reason="triton has no wheel for this system")
    return str(request.param)


def test_the_reference_is_the_definition() -> None:
    hidden, weight, targets = inputs(5, 30, 8)
    logits = hidden @ weight.t()
    logits[:, MASK] = -torch.inf
    p = logits.softmax(-1)
    logprob, entropy = linear_logprob(hidden, weight, targets, mask_token_id=MASK, impl="reference")
    torch.testing.assert_close(logprob, p.gather(1, targets[:, None])[:, 0].log())
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows_of_logits", [1, 64, 10_000])
def test_chunks_equal_autograd_in_float64(shape: tuple[int, int, int], rows_of_logits: int) -> None:
    case = inputs(*shape)
    expected = with_gradients(*case, torch.float64, impl="reference")
    max_elements = rows_of_logits * max(1, shape[0])
    got = with_gradients(*case, torch.float64, impl="chunked", max_elements=max_elements)
    assert [tensor.dtype for tensor in got] == [torch.float64] * 4
    assert_equal(got, expected, 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("max_elements", [300, 1 << 20])
def test_float32_is_the_equation_and_its_gradient(
    impl: str, shape: tuple[int, int, int], max_elements: int
) -> None:
    case = inputs(*shape)
    expected = with_gradients(*case, torch.float64, impl="reference")
    got = with_gradients(*case, torch.float32, impl=impl, max_elements=max_elements)
    assert [tensor.dtype for tensor in got] == [torch.float32] * 4
    assert_equal(got, expected, 5e-5)


@pytest.mark.parametrize("grads", [(1.0, 0.0), (0.0, 1.0)], ids=["logprob", "entropy"])
def test_each_output_has_its_own_gradient(impl: str, grads: tuple[float, float]) -> None:
    case = inputs(9, 150, 20)
    expected = with_gradients(*case, torch.float64, grads, impl="reference")
    assert_equal(with_gradients(*case, torch.float32, grads, impl=impl), expected, 5e-5)
    # One output alone reaches the backward as None in the other's place.
    leaves = [tensor.float().requires_grad_() for tensor in case[:2]]
    index = grads.index(1.0)
    output = linear_logprob(*leaves, case[2], mask_token_id=MASK, impl=impl)[index]
    alone = torch.autograd.grad(output, leaves, normal(3 + index, 9).float())
    assert_equal(list(alone), expected[2:], 5e-5)


def test_only_the_gradient_that_is_wanted_is_made(impl: str) -> None:
    hidden, weight, targets = (
        tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs(6, 90, 12)
    )
    expected = with_gradients(hidden, weight, targets, torch.float64, (1.0, 0.0), impl="reference")
    for index in (0, 1):
        leaves = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate((hidden, weight))]
        logprob, _ = linear_logprob(*leaves, targets, mask_token_id=MASK, impl=impl)
        (grad,) = torch.autograd.grad(logprob, leaves[index], normal(3, 6).float())
        assert_equal([grad], [expected[2 + index]], 5e-5)


def test_without_a_mask_token(impl: str) -> None:
    case = inputs(5, 140, 10)
    expected = with_gradients(*case, torch.float64, mask_token_id=None, impl="reference")
    assert_equal(with_gradients(*case, torch.float32, mask_token_id=None, impl=impl), expected, 5e-5)


def test_an_impossible_target_has_no_probability_and_the_others_keep_theirs(impl: str) -> None:
    hidden, weight, targets = inputs(4, 150, 10)
    targets[2] = MASK
    logprob, entropy = linear_logprob(hidden.float(), weight.float(), targets, mask_token_id=MASK, impl=impl)
    assert logprob.isneginf().tolist() == [False, False, True, False]
    assert entropy.isfinite().all()


def test_one_possible_token_is_certain(impl: str) -> None:
    weight = torch.full((300, 1), -torch.inf, device=DEVICE)
    weight[280] = 2.0
    target = torch.tensor([280], device=DEVICE)
    ones = torch.ones(1, 1, device=DEVICE)
    logprob, entropy = linear_logprob(ones, weight, target, mask_token_id=MASK, impl=impl, max_elements=64)
    assert (logprob.tolist(), entropy.tolist()) == ([0.0], [0.0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_huge_logits_and_a_broken_row(impl: str) -> None:
    hidden, weight, targets = inputs(4, 300, 6)
    hidden[0] *= 1e4
    hidden[2, 3] = torch.nan
    healthy = torch.tensor([0, 1, 3], device=DEVICE)
    expected = linear_logprob(hidden, weight, targets, mask_token_id=MASK, impl="reference")
    got = linear_logprob(hidden.float(), weight.float(), targets, mask_token_id=MASK, impl=impl)
    for actual, exact in zip(got, expected, strict=True):
        assert actual.isfinite().tolist() == [True, True, False, True]
        torch.testing.assert_close(actual[healthy].double(), exact[healthy], rtol=1e-5, atol=1e-4)


def test_bfloat16_gives_float32_outputs_and_bfloat16_gradients(impl: str) -> None:
    hidden, weight, targets = inputs(9, 300, 64)
    hidden, weight = (hidden / 8).bfloat16(), weight.bfloat16()
    expected = with_gradients(hidden, weight, targets, torch.float64, impl="reference")
    got = with_gradients(hidden, weight, targets, torch.bfloat16, impl=impl, max_elements=300 * 9)
    assert [tensor.dtype for tensor in got] == [torch.float32] * 2 + [torch.bfloat16] * 2
    # The CPU's matrix product rounds each logit to 8 bits, the interpreter cuts each gradient to 8.
    assert_equal(got[:2], expected[:2], 2**-5)
    for actual, exact in zip(got[2:], expected[2:], strict=True):
        assert float((actual.double() - exact).norm() / exact.norm()) < 2**-6


def test_chunks_start_where_logits_would_be_16_mib() -> None:
    assert holds_logits(1600, 336)
    assert holds_logits((1 << 22) // 1024 - 1, 1024)
    assert not holds_logits((1 << 22) // 1024, 1024)
