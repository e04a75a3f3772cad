"""An engine that fails: what clients are told."""

from __future__ import annotations

import httpx
import openai
import pytest
import torch
from openai import OpenAI

from fewstep.actors.engine.engine import Engine
from fewstep.actors.serving.service import CompletionService
from fewstep.platform.records import WeightVersion

ASKED = {"model": "tiny", "prompt": "abc"}


def no_numbers(engine: Engine) -> tuple[dict[str, torch.Tensor], WeightVersion]:
    """Weights whose logits are not numbers."""
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in engine.model.state_dict().items()}
    return state, WeightVersion("poison", 1, "0")


@pytest.fixture
def poisoned(service: CompletionService) -> None:
    service.host.load_weights(no_numbers)


@pytest.mark.usefixtures("poisoned")
def test_logits_that_are_not_numbers_are_a_server_error(url: str, client: OpenAI) -> None:
    response = httpx.post(f"{url}/v1/completions", json=ASKED)
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "server_error"
    assert "not finite" in error["message"]
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(stream=True, **ASKED))  # type: ignore[call-overload]


def test_a_dead_engine_is_unavailable_and_unhealthy(url: str, service: CompletionService) -> None:
    service.host.close()
    response = httpx.post(f"{url}/v1/completions", json=ASKED)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
    assert httpx.get(f"{url}/health").status_code == 503
