"""`fewstep serve --dry-run`: the plan is a comment behind the configuration, and says what would be refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tests.actors.serving.tiny import build_tokenizer, save_tiny, tiny_model

from fewstep.__main__ import main
from fewstep.actors.engine.engine import Engine
from fewstep.cluster.deploy import ServeConfig
from fewstep.cluster.inspection import byte_text
from fewstep.cluster.serve_plan import plan
from fewstep.platform.records import WeightVersion


def test_the_memory_is_what_an_engine_takes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    tokenizer = build_tokenizer()
    engine = Engine(
        tiny_model(tokenizer),
        tokenizer,
        max_sequences=5,
        weight_version=WeightVersion("x", 0, "0"),
        memory_bytes=2**21,
    )
    pages = engine.stats()["pages_total"]
    weights = sum(
        tensor.nbytes for tensor in engine.model.state_dict().values() if tensor.dtype == torch.float32
    )
    lines = dict(
        plan(ServeConfig(model=str(folder), port=0, max_sequences=5, cache_gib=2**21 / 2**30, num_replicas=2))
    )
    cache = int(pages * engine.stats()["page_bytes"])
    assert lines["memory"].startswith(
        f"a replica: {byte_text(weights)} of weights, {byte_text(cache)} for {int(pages):,} pages"
    )
    assert lines["together"].startswith(byte_text(2 * (weights + cache)))
    assert "refused" not in lines


def test_everything_that_would_be_refused_is_said(tmp_path: Path) -> None:
    config = ServeConfig(model=str(tmp_path / "none"), host="0.0.0.0", port=0)
    refused = [value for name, value in plan(config) if name == "refused"]
    assert len(refused) == 2
    assert "none" in refused[0]
    assert "without keys" in refused[1]


def test_a_dry_run_stays_a_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "tiny")
    assert main(["serve", "--model", str(folder), "--port", "0", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# memory" in printed
    assert ServeConfig.model_validate(yaml.safe_load(printed)).model == str(folder)
