"""What only a device can show: capture without a host sync, more than 2**31 numbers, splits chosen by the device."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.attention_cases import Case, exact, make
from tests.kernels.device import DEVICE
from tests.kernels.test_commit import random_batch

from fewstep.kernels.attention import block_attention
from fewstep.kernels.confidence import commit
from fewstep.kernels.head import head_confidence
from fewstep.kernels.rope import rope_and_write, rope_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an accelerator"),
]


def test_a_step_is_captured_and_replayed_on_other_numbers() -> None:
    inputs = make(Case("step", 8, (40, 21), own_block=8, head_dim=64), torch.bfloat16)
    other = make(Case("step", 8, (33, 5), own_block=8, head_dim=64), torch.bfloat16, seed=1)
    cos, sin = (table[:16].to(DEVICE) for table in rope_table(64, 16, 1e4))
    nowhere = torch.full((16,), -1, device=DEVICE)
    weight = torch.randn(300, 4 * 64, device=DEVICE, dtype=torch.bfloat16)
    rows, zeros, ones = (
        torch.arange(16, device=DEVICE),
        torch.zeros(16, device=DEVICE),
        torch.ones(16, device=DEVICE),
    )
    canvas, candidates, policy = random_batch(2, 8, seed=0)

    def step() -> tuple[torch.Tensor, ...]:
        q, k, v, key_pages, value_pages, *rest = inputs.arguments()
        k = rope_and_write(
            k.flatten(0, 1), v.flatten(0, 1), cos, sin, nowhere, key_pages, value_pages
        ).view_as(k)
        out = block_attention(q, k, v, key_pages, value_pages, *rest)
        stats = head_confidence(
            out.reshape(16, -1), rows, weight, mask_token_id=3, temperature=zeros, top_p=ones, uniform=None
        )
        filled = candidates._replace(token=stats.token.view(2, 8), confidence=stats.confidence.view(2, 8))
        return out, *commit(canvas, filled, policy)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for mine, theirs in zip(inputs.arguments()[:-1], other.arguments()[:-1], strict=True):
        mine.copy_(theirs)
    expected = [tensor.clone() for tensor in step()]
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)


def test_pages_behind_the_reach_of_32_bits() -> None:
    page = 32 * 8 * 128
    num_pages = 2**31 // page + 64
    if torch.cuda.mem_get_info()[0] < 4 * num_pages * page + (2 << 30):
        pytest.skip("needs 10 GiB of device memory")
    key_pages, value_pages = (
        torch.zeros(num_pages, 32, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
    )
    last = num_pages - 1
    k, v = (torch.randn(2, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    cos, sin = torch.ones(2, 64, device=DEVICE), torch.zeros(2, 64, device=DEVICE)
    destination = torch.tensor([last * 32, last * 32 + 1], device=DEVICE)
    rope_and_write(k, v, cos, sin, destination, key_pages, value_pages)
    assert torch.equal(key_pages[last, :2], k)
    assert torch.equal(value_pages[last, :2], v)
    q = torch.randn(1, 4, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    own = torch.randn(2, 1, 4, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    table = torch.full((1, 1), last, dtype=torch.int32, device=DEVICE)
    two, none, four = (torch.full((1,), n, dtype=torch.int32, device=DEVICE) for n in (2, 0, 4))
    arguments = (q, *own, key_pages, value_pages, table, two, none, none, four, 4)
    got, expected = (block_attention(*arguments, impl=impl) for impl in ("fused", "reference"))
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_of_the_devices_own_choice(dtype: torch.dtype) -> None:
    case = Case("long", 8, (2000, 300), page_size=16, heads=4, kv_heads=2, head_dim=128, own_block=4)
    inputs = make(case, dtype)
    out = block_attention(*inputs.arguments(), impl="fused")
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(out.double().cpu(), exact(case, inputs), rtol=tolerance, atol=tolerance)
