"""Rotation and the cache write against their definitions, every implementation, on awkward shapes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tests.kernels.device import DEVICE

from fewstep.kernels.rope import apply_rope, rope_and_write, rope_table

HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLEMENTATIONS = ["reference", "accumulated"] + ["fused"] * HAS_TRITON
# rows, heads, head_dim, rotated pairs
SHAPES = [(1, 1, 2, 1), (7, 3, 6, 3), (5, 4, 32, 16), (33, 2, 64, 8), (3, 5, 40, 15), (2, 1, 256, 128)]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def angles(rows: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rope_table(2 * pairs, 200, 1000.0)
    positions = torch.randint(200, (rows,), generator=torch.Generator().manual_seed(9))
    return cos[positions].to(DEVICE), sin[positions].to(DEVICE)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[R, H, D] in float64, as a product of complex numbers."""
    pairs = cos.shape[-1]
    number = torch.complex(x[..., :pairs].double(), x[..., pairs : 2 * pairs].double())
    number = number * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((number.real, number.imag, x[..., 2 * pairs :].double()), dim=-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pairs_are_turned_and_the_rest_passes(
    shape: tuple[int, int, int, int], dtype: torch.dtype, impl: str
) -> None:
    rows, heads, head_dim, pairs = shape
    x, (cos, sin) = normal(0, rows, heads, head_dim).to(dtype), angles(rows, pairs)
    if impl == "accumulated":
        cos, sin = cos.to(dtype), sin.to(dtype)
    out = apply_rope(x, cos[:, None], sin[:, None], impl=impl)
    assert out.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(out.double(), turned(x, cos, sin), **tolerance)
    assert torch.equal(out[..., 2 * pairs :], x[..., 2 * pairs :])


def test_the_gradient_turns_back() -> None:
    x, (cos, sin) = normal(1, 3, 2, 12).double().requires_grad_(), angles(3, 4)
    angle = (cos[:, None].double(), sin[:, None].double())
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, *angle, impl="reference"), x)


@pytest.mark.skipif(not HAS_TRITON, reason="triton has no wheel for this system")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_has_the_gradient_of_the_reference(shape: tuple[int, int, int, int]) -> None:
    rows, heads, head_dim, pairs = shape
    cos, sin = angles(rows, pairs)
    x, upstream = normal(5, 2, rows, heads, head_dim).requires_grad_(), normal(6, 2, rows, heads, head_dim)
    # One table for both sequences, and a gradient that is not contiguous.
    upstream = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    got, expected = (
        torch.autograd.grad(apply_rope(x, cos[None, :, None], sin[None, :, None], impl=impl), x, upstream)[0]
        for impl in ("fused", "reference")
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("destinations", [[], [-1] * 5, [0, -1, 7, 30, -1], [31, 3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_final_rows_are_stored_and_nothing_else_is_touched(
    destinations: list[int], dtype: torch.dtype, impl: str
) -> None:
    rows, page_size = len(destinations), 4
    k, v = (normal(seed, rows, 3, 10).to(dtype) for seed in (2, 3))
    cos, sin = (table.to(dtype) for table in angles(rows, 4))
    keys, values = (
        torch.full((8, page_size, 3, 10), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)
    )
    destination = torch.tensor(destinations, dtype=torch.int64, device=DEVICE)
    out = rope_and_write(k, v, cos, sin, destination, keys, values, impl=impl)
    assert torch.equal(out, apply_rope(k, cos[:, None], sin[:, None], impl=impl))
    written = {position: row for row, position in enumerate(destinations) if position >= 0}
    for position in range(8 * page_size):
        key, value = (pages[position // page_size, position % page_size] for pages in (keys, values))
        if position in written:
            assert torch.equal(key, out[written[position]])
            assert torch.equal(value, v[written[position]])
        else:
            assert key.isnan().all()
            assert value.isnan().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_destinations_the_pages_are_not_needed(impl: str) -> None:
    k, (cos, sin) = normal(4, 6, 2, 8), angles(6, 4)
    pages = torch.zeros(1, 4, 2, 8, device=DEVICE)
    out = rope_and_write(k, k, cos, sin, None, pages, pages, impl=impl)
    assert torch.equal(out, apply_rope(k, cos[:, None], sin[:, None], impl=impl))
    assert not pages.any()
