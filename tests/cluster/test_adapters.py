"""Adapters on the command line and behind an endpoint: what is said of one, and that the merged model answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench.small_checkpoints import CONFIGS, write_small
from fastapi.testclient import TestClient
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from tests.actors.serving.tiny import save_tiny

from fewstep.__main__ import main
from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.serving.app import create_app
from fewstep.actors.serving.engine_source import EngineOptions
from fewstep.actors.serving.loading import load_service
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.service import CompletionService
from fewstep.cluster.deploy import ServeConfig, checked_sources
from fewstep.cluster.serve_plan import plan
from fewstep.cluster.served_models import AdaptedModel, model_sources
from fewstep.kernels.model.adapter_folder import save_adapter
from fewstep.kernels.model.checkpoint import load_model, state_checksum
from fewstep.kernels.model.lora import Lora
from fewstep.kernels.model.lora_settings import LoraSettings
from fewstep.platform.artifacts import weights_digest
from fewstep.platform.errors import CheckpointError, ConfigError
from fewstep.platform.mlflow_store import sqlite_uri
from fewstep.platform.records import DecodePolicy, WeightVersion

SETTINGS = LoraSettings(rank=2, alpha=4)
POLICY = DecodePolicy(threshold=0.5)


def write_adapter(folder: Path, base: Path, seed: int) -> dict[str, torch.Tensor]:
    """An adapter that changes what a model says; the merged weights."""
    model, _ = load_model(base)
    lora = Lora(model.config, SETTINGS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_adapter(folder, lora.factors(), SETTINGS, model.config, str(base), weights_digest(base))
    return lora.merged(model.state_dict(), lora.factors())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_tiny(folder / "tiny")
    write_adapter(folder / "run" / "adapter", folder / "tiny", 1)
    return folder


@pytest.fixture(scope="module")
def sources(home: Path) -> tuple[ModelSource, ...]:
    entry = AdaptedModel(model=str(home / "tiny"), adapter=str(home / "run"), name="mine")
    return checked_sources(ServeConfig(model=(str(home / "tiny"), entry), port=0), "127.0.0.1")


@pytest.fixture(scope="module")
def services(sources: tuple[ModelSource, ...]) -> Iterator[list[CompletionService]]:
    options = EngineOptions(max_sequences=2, memory_bytes=2**22)
    made = [load_service(source, POLICY, 24, options, num_threads=1) for source in sources]
    yield made
    for service in made:
        service.host.close()


def test_both_models_answer_and_each_with_its_own_weights(
    home: Path, services: list[CompletionService]
) -> None:
    client = TestClient(create_app(*services))
    listed = client.get("/v1/models").json()["data"]
    assert [(entry["id"], entry["parent"], entry["root"]) for entry in listed] == [
        ("tiny", None, str(home / "tiny")), ("mine", "tiny", str(home / "run" / "adapter")),
    ]  # fmt: skip
    assert client.get("/v1/models/mine").json() == listed[1]
    base, merged = load_model(home / "tiny"), write_adapter(home / "same", home / "tiny", 1)
    texts = {}
    for name, state in (("tiny", base[0].state_dict()), ("mine", merged)):
        model, tokenizer = load_model(home / "tiny")
        model.load_state_dict(dict(state))
        engine = Engine(model, tokenizer, weight_version=WeightVersion("x", 0, ""))
        prompt = tuple(tokenizer.encode("def f(x):").ids)
        texts[name] = engine.text_of(engine.generate([Request("r", prompt, POLICY, 24)])[0])
        body = {"model": name, "prompt": "def f(x):", "max_tokens": 24, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == texts[name]
        assert answer["model"] == name
        assert answer["system_fingerprint"] == f"{name}:0:{state_checksum(state)[:12]}"
    assert texts["tiny"] != texts["mine"]


def test_an_adapter_has_a_name_of_its_own_and_pins_its_base(home: Path) -> None:
    entry = AdaptedModel(model=str(home / "tiny"), adapter=str(home / "run" / "adapter"))
    (found,) = model_sources(entry, "", "")
    assert (found.name, found.parent, found.alias, found.weights) == (
        "adapter", "tiny", "", str(home / "run" / "adapter"),
    )  # fmt: skip
    assert model_sources(entry, "asked", "")[0].name == "asked"
    with pytest.raises(ConfigError, match=r"two models named 'adapter'.*give an adapter a name"):
        model_sources((entry, entry), "", "")


def test_an_adapter_of_another_model_is_refused_before_anything_starts(home: Path, tmp_path: Path) -> None:
    other = write_small(tmp_path / "sdar", CONFIGS["sdar"])
    config = ServeConfig(model=AdaptedModel(model=str(other), adapter=str(home / "run")), port=0)
    with pytest.raises(CheckpointError, match=r"got no module layers\.0\.mlp\.down_proj in the sdar model"):
        checked_sources(config, "127.0.0.1")
    assert any(name == "refused" and "in the sdar model" in text for name, text in plan(config))


def test_an_adapter_on_other_weights_of_its_models_shape_is_refused_everywhere(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(home / "tiny", other)
    state = load_file(str(other / "model.safetensors"))
    save_file({name: tensor + 1 for name, tensor in state.items()}, str(other / "model.safetensors"))
    told = f"adapter {home / 'run' / 'adapter'}: got weights of digest {weights_digest(other)[:16]} below it, in {other}"
    config = ServeConfig(model=AdaptedModel(model=str(other), adapter=str(home / "run")), port=0)
    with pytest.raises(CheckpointError, match=re.escape(told)) as refused:
        checked_sources(config, "127.0.0.1")
    assert "\n" not in str(refused.value)
    assert ("refused", str(refused.value)) in plan(config)
    shutil.copytree(home / "run" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(other)}))
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "no: adapter" in capsys.readouterr().out


def test_inspect_fetches_no_base(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = sqlite_uri(tmp_path)
    client = MlflowClient(uri, registry_uri=uri)
    client.create_registered_model("far")
    client.create_model_version("far", "s3://nowhere/far")
    shutil.copytree(home / "run" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    for base, told in (
        ("models:/far/1", "there is no model at models:/far/1"),
        ("models:/none/1", "model: got models:/none/1"),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
        assert main(["inspect", str(tmp_path / "adapter"), f"tracking_uri={uri}"]) == 0
        assert f"unknown: {told}" in capsys.readouterr().out


def test_a_plan_counts_an_adapter_as_weights_of_its_own(home: Path) -> None:
    one = dict(plan(ServeConfig(model=str(home / "tiny"), port=0)))
    entry = AdaptedModel(model=str(home / "tiny"), adapter=str(home / "run"))
    two = dict(plan(ServeConfig(model=(str(home / "tiny"), entry), port=0)))
    assert "adapter" not in one
    assert two["adapter"] == f"{home / 'run' / 'adapter'}: rank 2, merged into weights of its own"
    size, unit = one["together"].split()[:2]
    assert two["together"].split()[:2] == [f"{2 * float(size):.1f}", unit]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model={model: a}", "model.adapter: got nothing; allowed: a value (the key is required)"),
        ("model=[a, {adapter: b, nam: c}]", "model.1.nam: got an unknown key; allowed: adapter, model, name"),
        ('model=[a, {adapter: ""}]', "model.1.adapter: got ''"),
        ("model=3", "model: got 3"),
    ],
)
def test_a_mistake_in_an_entry_is_told_by_its_key(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", option, "--dry-run"]) == 2
    assert f"fewstep: error: {message}" in capsys.readouterr().err


def test_inspect_says_what_an_adapter_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = home / "run" / "adapter"
    assert main(["inspect", str(adapter)]) == 0
    text = capsys.readouterr().out
    assert "LoRA of rank 2, alpha 4: 2 B A is added" in text
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; 7 layers" in text
    assert f"{home / 'tiny'}, weights {weights_digest(home / 'tiny')[:16]}" in text
    assert "yes, by names and shapes, and by the digest of the weights" in text
    assert main(["inspect", str(adapter), "--show", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    num_parameters = sum(p.numel() for p in Lora(load_model(home / "tiny")[0].config, SETTINGS).parameters())
    assert report["parameters"] == num_parameters
    assert report["file_bytes"] == (adapter / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("base", "told"),
    [("meta-llama/Llama-3", "unknown: there is no model at"), (None, "unknown: the adapter names no base"),
     ("embedded", "no: ")],
)  # fmt: skip
def test_inspect_says_whether_the_base_is_here_and_fits(
    base: str | None, told: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "adapter", home / "tiny", 2)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert told in capsys.readouterr().out
