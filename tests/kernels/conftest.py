"""Every kernel test runs on poisoned memory: an output element that is never written is NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.kernels.device import poisoned_memory


@pytest.fixture(autouse=True, scope="module")
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield
