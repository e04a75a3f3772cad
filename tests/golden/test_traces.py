"""The engine's decisions on the embedded model, against traces in the tree: a refactor must not move one of them."""

from __future__ import annotations

import json
from pathlib import Path

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.model.checkpoint import embedded_model, load_model, state_checksum
from fewstep.platform.records import DecodePolicy, WeightVersion

GOLDEN = json.loads(Path(__file__).with_name("traces.json").read_text())


def test_embedded_weights_are_those_the_traces_were_made_with() -> None:
    model, _ = load_model(embedded_model())
    assert state_checksum(model.state_dict()) == GOLDEN["weights"]


def test_every_trace_is_reproduced_in_one_batch() -> None:
    """All prompts and policies share their forwards, so this holds the batch to the singles that were recorded."""
    model, tokenizer = load_model(embedded_model())
    engine = Engine(model, tokenizer, weight_version=WeightVersion("golden", 0, ""))
    requests = [
        Request(f"{i}", tuple(tokenizer.encode(t["prompt"]).ids), DecodePolicy(**t["policy"]), max_tokens=80)
        for i, t in enumerate(GOLDEN["traces"])
    ]
    assert len(requests) == 12
    for trace, trajectory in zip(GOLDEN["traces"], engine.generate(requests), strict=True):
        assert trajectory.completion_ids.tolist() == trace["completion_ids"], trace["prompt"]
        assert trajectory.step_map[: trajectory.num_tokens].tolist() == trace["step_map"], trace["prompt"]
        assert trajectory.forwards == trace["forwards"]
        assert trajectory.finish_reason == trace["finish_reason"]
