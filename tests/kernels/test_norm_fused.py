"""RMSNorm's one-pass kernels against float64, forward and backward, on awkward shapes."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.device import DEVICE

from fewstep.kernels.norm import rms_norm

pytest.importorskip("triton", reason="triton has no wheel for this system")

SHAPES = [(0, 16), (1, 1), (1, 7), (3, 5, 37), (33, 128), (2, 5000), (65, 64)]
EPS = 1e-5


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).to(DEVICE, dtype)
    return [x.requires_grad_(), weight.requires_grad_(), grad]


def exact(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and both gradients by autograd through the equation in float64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    out = x / ((x * x).mean(-1, keepdim=True) + EPS).sqrt() * weight
    return [out, *torch.autograd.grad(out, (x, weight), grad.double())]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_is_the_equation_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, grad = inputs(shape, dtype)
    out = rms_norm(x, weight, EPS, impl="fused")
    got = [out, *torch.autograd.grad(out, (x, weight), grad)]
    # float32: sums of up to 5,000 products; bfloat16: one rounding at the end, which the interpreter does by cutting.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    for actual, expected in zip(got, exact(x, weight, grad), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, **tolerance)


def test_a_float32_weight_of_bfloat16_rows() -> None:
    x, weight, grad = inputs((5, 40), torch.bfloat16)
    weight = weight.detach().float().requires_grad_()
    out = rms_norm(x, weight, EPS, impl="fused")
    got = [out, *torch.autograd.grad(out, (x, weight), grad)]
    assert [tensor.dtype for tensor in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for actual, expected in zip(got, exact(x, weight, grad), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2**-7, atol=1e-5)


def test_a_row_of_zeros_gives_zeros_and_a_finite_gradient() -> None:
    x = torch.zeros(2, 9, device=DEVICE, requires_grad=True)
    out = rms_norm(x, torch.ones(9, device=DEVICE), EPS, impl="fused")
    assert (out == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(grad, EPS**-0.5))


def test_a_nan_stays_in_its_row() -> None:
    x = torch.ones(3, 40, device=DEVICE)
    x[1, 3] = torch.nan
    out = rms_norm(x, torch.ones(40, device=DEVICE), EPS, impl="fused")
    assert out.isnan().any(-1).tolist() == [False, True, False]


def test_views_that_are_not_contiguous_give_the_same() -> None:
    x, weight, grad = inputs((6, 40), torch.float32)
    turned = x.detach().t().contiguous().t().requires_grad_()
    assert not turned.is_contiguous()
    expected = torch.autograd.grad(rms_norm(x, weight, EPS, impl="fused"), x, grad)[0]
    out = rms_norm(turned, weight, EPS, impl="fused")
    assert torch.equal(out, rms_norm(x, weight, EPS, impl="fused"))
    torch.testing.assert_close(torch.autograd.grad(out, turned, grad.t().contiguous().t())[0], expected)
