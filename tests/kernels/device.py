"""Where kernel tests run, and memory that betrays an output nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Without a GPU the root conftest has turned Triton's interpreter on.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are NaN, or the largest integer, until written: torch's own debugging fill."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
