"""RMSNorm and RoPE against their equations and the properties they are used for."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels.norm import rms_norm
from fewstep.kernels.rope import apply_rope, rope_table


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_is_its_equation() -> None:
    x, weight = normal(0, 3, 5, 16), normal(1, 16)
    expected = x / ((x * x).mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), expected)


def test_rope_turns_each_pair_by_its_angle() -> None:
    theta, position = 100.0, 7
    cos, sin = rope_table(6, 10, theta)
    x = normal(2, 1, 1, 2, 6)
    out = apply_rope(x, cos[None, position : position + 1, None], sin[None, position : position + 1, None])
    pairs = torch.complex(x[..., :3], x[..., 3:])
    angle = position * theta ** (-torch.arange(0, 6, 2) / 6)
    turned = pairs * torch.polar(torch.ones(3), angle)
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1))


def test_rope_scores_depend_on_the_distance_only() -> None:
    cos, sin = rope_table(8, 64, 10_000.0)
    q, k = normal(3, 8), normal(4, 8)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        def at(x: torch.Tensor, position: int) -> torch.Tensor:
            return apply_rope(x[None, None, None], cos[position], sin[position]).flatten()

        return at(q, at_q) @ at(k, at_k)

    torch.testing.assert_close(score(9, 4), score(60, 55), rtol=1e-4, atol=1e-5)
    assert (score(9, 4) - score(9, 6)).abs() > 1e-2


@pytest.mark.parametrize("shape", [(0, 8), (1, 5), (3, 40, 64), (256, 96)])
def test_the_widened_norm_rounds_once(shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 9).bfloat16()
    weight = torch.linspace(-2.0, 3.0, shape[-1]).bfloat16()
    with torch.inference_mode():
        out = rms_norm(x, weight, 1e-5)
        assert torch.equal(out, rms_norm(x, weight, 1e-5, impl="widened"))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert out.dtype == torch.bfloat16
    # Half a unit in bfloat16's last place, and float32's rounding before it.
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)
