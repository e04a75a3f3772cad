"""The masked-row head against the dense head."""

from __future__ import annotations

import torch

from fewstep.kernels.confidence import row_stats
from fewstep.kernels.head import head_statistics


def test_masked_rows_get_the_dense_head_s_statistics_in_any_chunking() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 12, generator=generator), torch.randn(29, 12, generator=generator)
    rows = torch.tensor([3, 4, 9, 17, 18, 30, 39])
    temperature, top_p = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.5, 1.0, 0.7]), torch.full((7,), 0.9)
    uniform = torch.rand(7, generator=generator, dtype=torch.float64)
    dense = row_stats((hidden @ weight.T)[rows], temperature, top_p, uniform)
    largest = 0

    def project(chunk: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(chunk))
        return chunk @ weight.T

    for max_elements, most_rows in ((1 << 20, 7), (29 * 3, 3), (1, 1)):
        largest = 0
        stats = head_statistics(hidden, rows, project, 29, temperature, top_p, uniform, max_elements)
        assert largest == most_rows
        assert torch.equal(stats.token, dense.token)
        torch.testing.assert_close(stats.logprob, dense.logprob)
        torch.testing.assert_close(stats.confidence, dense.confidence)
