"""Packed products against float64, and against the plain layers they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fewstep.kernels.linear import PackedWeight, Projection

SUPPORTED = PackedWeight.supported(torch.empty(1, 1, dtype=torch.bfloat16))
needs_packing = pytest.mark.skipif(not SUPPORTED, reason="oneDNN has no bfloat16 products on this CPU")


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
@pytest.mark.parametrize(("d", "n"), [(16, 5), (96, 130), (33, 64)])
def test_packed_results_are_within_one_rounding_of_float64(d: int, n: int, rows: int, bias: bool) -> None:
    layer = Projection(d, n, bias, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(random(1, n, d) * d**-0.5)
        if bias:
            layer.bias.copy_(random(2, n))
    x, other = random(3, 1, rows, d), random(4, 1, rows, n)
    layer.pack()
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.inference_mode():
        results = (
            (layer(x), exact),
            (layer.swish(x), F.silu(exact)),
            (layer.times(x, other), exact * other.double()),
            (layer.plus(x, other), exact + other.double()),
        )
    for result, expected in results:
        assert result.dtype == torch.bfloat16
        # Half a unit in bfloat16's last place is 2**-9 of the value; sums of d terms add float32's rounding.
        torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-5)


def test_unpacked_is_torchs_linear_and_the_operation_after_it() -> None:
    layer = Projection(12, 9, True)
    x, other = torch.randn(4, 12), torch.randn(4, 9)
    plain = F.linear(x, layer.weight, layer.bias)
    layer.pack()  # float32: nothing to pack
    assert layer._packed is None
    assert torch.equal(layer(x), plain)
    assert torch.equal(layer.swish(x), F.silu(plain))
    assert torch.equal(layer.times(x, other), plain * other)
    assert torch.equal(layer.plus(x, other), plain + other)


@needs_packing
def test_packing_again_takes_the_new_weights() -> None:
    layer = Projection(8, 8, False, dtype=torch.bfloat16)
    x = random(5, 3, 8)
    layer.pack()
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    assert torch.equal(layer(x), before)
    layer.pack()
    assert torch.equal(layer(x), 2 * before)
    assert list(layer.state_dict()) == ["weight"]
