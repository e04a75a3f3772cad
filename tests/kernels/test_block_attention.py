"""Block attention over pages: every implementation against loops in float64, with NaN wherever nobody may look."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.attention_cases import CASES, Case, Inputs, exact, make
from tests.kernels.device import DEVICE

from fewstep.kernels.attention import GatherPlan, block_attention

HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLEMENTATIONS = ["reference", "gathered"] + ["fused"] * HAS_TRITON
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton has no wheel for this system")
CPU = torch.device("cpu")


def inputs_for(impl: str, case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """`gathered` is the CPU's own."""
    return make(case, dtype, seed, CPU if impl == "gathered" else DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_is_the_softmax_over_what_is_visible(case: Case, impl: str) -> None:
    inputs = inputs_for(impl, case)
    out = block_attention(*inputs.arguments(), impl=impl)
    torch.testing.assert_close(out.double().cpu(), exact(case, inputs), rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_splits_are_joined_to_the_same(case: Case) -> None:
    from fewstep.kernels.attention import fused

    inputs = make(case)
    out = fused.block_attention(*inputs.arguments(), num_splits=3)
    torch.testing.assert_close(out.double().cpu(), exact(case, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_bfloat16_sums_in_float32(impl: str, head_dim: int) -> None:
    case = Case("bf16", 8, (21, 140), head_dim=head_dim, own_block=4)
    inputs = inputs_for(impl, case, torch.bfloat16)
    out = block_attention(*inputs.arguments(), impl=impl)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double().cpu(), exact(case, inputs), rtol=2**-6, atol=2**-6)


@st.composite
def batches(draw: st.DrawFn) -> Case:
    num, rows = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    kv_heads = draw(st.integers(1, 2))
    numbers = st.integers(0, 40)
    suffix = draw(st.none() | st.lists(st.tuples(numbers, numbers), min_size=num, max_size=num).map(tuple))
    return Case(
        "drawn",
        rows,
        tuple(draw(st.lists(numbers, min_size=num, max_size=num))),
        page_size=draw(st.sampled_from([1, 3, 4, 16])),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=8,
        own_block=draw(st.integers(1, 10)),
        own=draw(st.none() | st.lists(st.integers(0, rows), min_size=num, max_size=num).map(tuple)),
        suffix=suffix,
    )


@settings(deadline=None, max_examples=100)
@given(case=batches())
def test_gathered_is_the_reference_on_any_batch(case: Case) -> None:
    inputs = inputs_for("gathered", case)
    expected = block_attention(*inputs.arguments(), impl="reference")
    assert expected.isfinite().all()
    out = block_attention(*inputs.arguments(), impl="gathered")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def plan_of(case: Case, keep: bool = False, width: int = 64) -> tuple[GatherPlan, list[object]]:
    inputs = inputs_for("gathered", case)
    plan = GatherPlan(
        *inputs.arguments()[5:], num_rows=case.rows, page_size=case.page_size, width=width, keep=keep
    )
    return plan, inputs.arguments()


def test_a_plan_serves_every_layer() -> None:
    case = Case("plan", 8, (21, 40))
    plan, _ = plan_of(case)
    for layer in range(3):
        arguments = inputs_for("gathered", case, seed=layer).arguments()
        out = block_attention(*arguments, plan=plan, layer=layer)
        assert torch.equal(out, block_attention(*arguments, impl="gathered"))
        torch.testing.assert_close(out, block_attention(*arguments, impl="reference"))


def test_a_plan_that_keeps_its_pages_reads_them_once_and_new_rows_each_time() -> None:
    case = Case("kept", 8, (21, 0, 40), own=(8, 3, 8))
    plan, arguments = plan_of(case, keep=True)
    first = block_attention(*arguments, plan=plan, layer=0)
    assert torch.equal(first, block_attention(*arguments, impl="gathered"))
    other = inputs_for("gathered", case, seed=1).arguments()
    changed = [*other[:3], *arguments[3:]]
    expected = block_attention(*changed, impl="gathered")
    changed[3], changed[4] = torch.full_like(changed[3], torch.nan), torch.full_like(changed[4], torch.nan)
    assert torch.equal(block_attention(*changed, plan=plan, layer=0), expected)
    assert block_attention(*changed, plan=plan, layer=1).isnan().any()


def test_units_of_very_different_length_are_attended_apart_with_the_same_result() -> None:
    case = Case("apart", 8, (4, 8, 400, 416, 30))
    together, arguments = plan_of(case, width=1)
    apart, _ = plan_of(case, width=4096)
    assert [len(plan._runs) for plan in (together, apart)] == [1, 3]
    torch.testing.assert_close(
        block_attention(*arguments, plan=together), block_attention(*arguments, plan=apart)
    )
