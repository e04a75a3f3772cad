"""Every kernel test runs on poisoned memory: an output element that is never written is NaN."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from tests.kernels.device import poisoned_memory, repair_bfloat16_products

from fewstep.kernels.launch import interpreted

if interpreted() and importlib.util.find_spec("triton") is not None:
    repair_bfloat16_products()


@pytest.fixture(autouse=True, scope="module")
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield
