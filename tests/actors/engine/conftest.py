"""Set-up of the engine's tests: one thread, as its models are too small to share among cores; both ways to run a step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.actors.engine.reference import models


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["any shape", "static"])
def both_ways_to_step(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests twice: engines without static steps, and engines that take them wherever they can."""
    before = models.STATIC_STEPS
    models.STATIC_STEPS = request.param == "static"
    yield
    models.STATIC_STEPS = before
