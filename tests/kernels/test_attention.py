"""Who sees whom, and the softmax over it, against loops over positions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.kernels.attention import attend, visibility


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 11), st.integers(-1, 3), st.integers(0, 2)), min_size=1, max_size=10
    ),
    block_size=st.integers(1, 5),
)
def test_a_row_sees_earlier_clean_blocks_and_its_own_block_of_its_own_copy_and_document(
    rows: list[tuple[int, int, int]], block_size: int
) -> None:
    positions, copies, documents = (torch.tensor([column]) for column in zip(*rows, strict=True))
    visible = visibility(positions, copies, block_size, documents)[0].tolist()
    for q, (position_q, copy_q, document_q) in enumerate(rows):
        for k, (position_k, copy_k, document_k) in enumerate(rows):
            block_q, block_k = position_q // block_size, position_k // block_size
            if -1 in (copy_q, copy_k) or document_q != document_k:
                expected = q == k
            elif block_k == block_q:
                expected = copy_k == copy_q
            else:
                expected = block_k < block_q and copy_k == 0
            assert visible[q][k] == expected


def test_attend_is_the_masked_softmax_with_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, 8, generator=generator)
    k, v = torch.randn(2, 2, 7, 2, 8, generator=generator)
    visible = torch.rand(2, 5, 7, generator=generator) < 0.5
    visible[..., 0] = True
    out = attend(q, k, v, visible)
    for head in range(4):
        scores = q[:, :, head] @ k[:, :, head // 2].transpose(1, 2) / 8**0.5
        weight = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        torch.testing.assert_close(out[:, :, head], weight @ v[:, :, head // 2])
