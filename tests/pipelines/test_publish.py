"""A model folder goes into the registry, answers in a process that knows only its address, and comes out again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.model.checkpoint import MODEL_FILES, load_model, save_model, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.pipelines.publish import log_checkpoint, publish_model
from fewstep.platform.artifacts import file_digest, weights_digest
from fewstep.platform.errors import CheckpointError, ConfigError, ResourceError
from fewstep.platform.mlflow_registry import (
    alias_address,
    find_model,
    model_facts,
    move_alias,
)
from fewstep.platform.mlflow_store import open_client, run_page, sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import DecodePolicy, WeightVersion
from fewstep.platform.tracking import MemoryTracker, TrackedModel

WORDS = ("<|mask|>", "<|eos|>", "<|pad|>", "<|unk|>", "def", "f", "(", "x", ")", ":", "return", "+", "a", "b")
PROMPTS = ["def f ( x ) :", "a + b"]
POLICY = DecodePolicy(threshold=0.6)

ASKS = """
import json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
prompts = json.loads(sys.argv[2])
params = {"max_tokens": 12, "temperature": 1.0, "seed": 3, "threshold": 0.4}
answers = {
    "list": model.predict(prompts),
    "frame": list(model.predict(pandas.DataFrame({"prompt": prompts}))),
    "params": model.predict(prompts, params=params),
}
try:
    model.predict(prompts, params={"threshold": 7.0})
except Exception as error:
    answers["refused"] = str(error)
print(json.dumps(answers))
"""


def write_model(folder: Path, seed: int) -> Path:
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<|unk|>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = ModelConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=64, max_position_embeddings=128, block_size=8,
        mask_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = Transformer(config)
    model.initialise(seed)
    save_model(folder, model.state_dict(), config, tokenizer)
    return folder


def publish(
    tracker: MlflowTracker, folder: Path, *, name: str, alias: str = "champion", step: int = 0
) -> str:
    return publish_model(
        tracker, folder, name=name, alias=alias, metrics={"eval/heldout/pass_at_1": 0.5},
        input_example=PROMPTS[0], policy=POLICY, step=step, dataset="held-out",
    )  # fmt: skip


def open_run(uri: str) -> MlflowTracker:
    tracker = MlflowTracker(uri, experiment="publish", run_name="test", system_metrics=False)
    tracker.log_dataset("held-out", digest="d" * 64, context="evaluation", source="seed 1")
    return tracker


def digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in MODEL_FILES}


def engine_answers(folder: Path, policy: DecodePolicy, max_tokens: int) -> list[str]:
    model, tokenizer = load_model(folder)
    engine = Engine(
        model, tokenizer, weight_version=WeightVersion("test", 0, state_checksum(model.state_dict()))
    )
    requests = [Request(text, tuple(tokenizer.encode(text).ids), policy, max_tokens) for text in PROMPTS]
    return [engine.text_of(trajectory) for trajectory in engine.generate(requests)]


def ask_in_a_fresh_process(model_uri: str, tracking_uri: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", ASKS, model_uri, json.dumps(PROMPTS)],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sqlite_uri(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "first", seed=1)


def test_a_registered_model_answers_in_a_fresh_process_as_the_engine_does(
    uri: str, folder: Path, tmp_path: Path
) -> None:
    with open_run(uri) as tracker:
        model_uri = publish(tracker, folder, name="answers")
    assert model_uri == "models:/answers@champion"
    answers = ask_in_a_fresh_process(model_uri, uri, tmp_path)
    # Half of the 128 positions are the default budget.
    assert answers["list"] == answers["frame"] == engine_answers(folder, POLICY, 64)
    sampled = DecodePolicy(threshold=0.4, temperature=1.0, seed=3)
    assert answers["params"] == engine_answers(folder, sampled, 12)
    assert answers["refused"].startswith("threshold: got 7.0")
    assert list(tmp_path.iterdir()) == [], "loading a model wrote into the caller's folder"


def test_the_registry_shows_where_a_model_comes_from(uri: str, folder: Path) -> None:
    with open_run(uri) as tracker:
        publish(tracker, folder, name="lineage", step=40)
    client = open_client(uri, create=False)
    version = client.get_model_version_by_alias("lineage", "champion")
    assert version.run_id == tracker.run_id
    logged = client.get_logged_model(version.tags["logged_model"])
    assert (version.tags["step"], version.tags["eval/heldout/pass_at_1"]) == ("40", "0.5")
    assert str(logged.status) == "READY"
    assert logged.params["policy.threshold"] == "0.6"
    (metric,) = logged.metrics
    assert (metric.key, metric.value, metric.step) == ("eval/heldout/pass_at_1", 0.5, 40)
    assert (metric.dataset_name, metric.dataset_digest) == ("held-out", "d" * 16)
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [
        {"name": "lineage", "version": version.version}
    ]
    (output,) = client.get_run(tracker.run_id).outputs.model_outputs
    assert output.model_id == logged.model_id
    requirements = (Path(logged.artifact_location.removeprefix("file://")) / "requirements.txt").read_text()
    assert "+cpu" not in requirements
    assert {line.partition("==")[0] for line in requirements.split()} >= {"fewstep", "mlflow", "torch"}


def test_the_alias_moves_and_each_address_gives_its_folder(uri: str, folder: Path, tmp_path: Path) -> None:
    second = write_model(tmp_path / "second", seed=2)
    with open_run(uri) as tracker:
        publish(tracker, folder, name="moves")
        assert digests(find_model("models:/moves@champion", uri).folder) == digests(folder)
        publish(tracker, second, name="moves")
    assert digests(find_model("models:/moves@champion", uri).folder) == digests(second)
    assert digests(find_model("models:/moves/1", uri).folder) == digests(folder)
    model_id = open_client(uri, create=False).get_model_version("moves", "1").tags["logged_model"]
    assert digests(find_model(f"models:/{model_id}", uri).folder) == digests(folder)


def test_a_model_that_cannot_be_packed_gets_no_version(uri: str, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("this is not Python")
    model = TrackedModel(
        folder=folder, name="broken", alias="champion", metrics={}, input_example="a", code=broken,
        policy=POLICY, max_tokens=8,
    )  # fmt: skip
    with open_run(uri) as tracker, pytest.raises((SyntaxError, ResourceError)):
        tracker.register_model(model)
    client = open_client(uri, create=False)
    assert [found.name for found in client.search_registered_models() if found.name == "broken"] == []
    logged = client.search_logged_models([tracker.experiment_id])
    assert [str(found.status) for found in logged if found.name == "broken"] == ["FAILED"]


def test_a_missing_folder_is_named_before_anything_is_logged(uri: str, tmp_path: Path) -> None:
    with open_run(uri) as tracker, pytest.raises(CheckpointError, match="absent"):
        publish(tracker, tmp_path / "absent", name="absent")
    assert mlflow_names(uri).isdisjoint({"absent"})


def test_an_unknown_data_set_is_a_mistake(uri: str, folder: Path) -> None:
    tracker = MlflowTracker(uri, experiment="publish", run_name="bare", system_metrics=False)
    with tracker, pytest.raises(ValueError, match="held-out"):
        publish(tracker, folder, name="no-data")


def test_a_checkpoint_is_pointed_to_and_answers_as_long_as_its_weights_are_there(
    uri: str, tmp_path: Path
) -> None:
    own = write_model(tmp_path / "step_20", seed=3)
    with open_run(uri) as tracker:
        log_checkpoint(
            tracker, own, name="steps", metrics={"checkpoint/pass_rate": 0.5}, input_example=PROMPTS[0], policy=POLICY,
            step=20,
        )  # fmt: skip
    client = open_client(uri, create=False)
    (logged,) = (m for m in client.search_logged_models([tracker.experiment_id]) if m.name == "steps")
    assert str(logged.status) == "READY"
    assert [(m.key, m.value, m.step) for m in logged.metrics] == [("checkpoint/pass_rate", 0.5, 20)]
    packed = Path(logged.artifact_location.removeprefix("file://"))
    assert list(packed.rglob("*.safetensors")) == [], "the weights were copied"
    address = f"models:/{logged.model_id}"
    assert find_model(address, uri).folder == own
    answers = ask_in_a_fresh_process(address, uri, tmp_path / "elsewhere")
    assert answers["list"] == engine_answers(own, POLICY, 64)
    write_model(own, seed=4)
    with pytest.raises(CheckpointError, match="other weights"):
        find_model(address, uri)
    shutil.rmtree(own)
    with pytest.raises(CheckpointError, match="no weights"):
        find_model(address, uri)


def test_an_alias_that_moves_does_not_move_what_was_found(uri: str, folder: Path, tmp_path: Path) -> None:
    with open_run(uri) as tracker:
        publish(tracker, folder, name="pinned")
        found = find_model("models:/pinned@champion", uri)
        publish(tracker, write_model(tmp_path / "second", seed=2), name="pinned")
    assert found.address == "models:/pinned/1"
    assert digests(found.folder) == digests(folder)
    assert find_model(found.address, uri) == found
    assert find_model("models:/pinned@champion", uri).address == "models:/pinned/2"


def test_facts_travel_with_the_model(uri: str, folder: Path) -> None:
    facts = {"frontier": [{"label": "static_1", "pass_at_1": 0.5}]}
    with open_run(uri) as tracker:
        publish_model(
            tracker, folder, name="facts", alias="candidate", metrics={}, input_example="a", policy=POLICY, step=3,
            facts=facts,
        )  # fmt: skip
    address, found = model_facts("models:/facts@candidate", uri)
    digest = found.pop("weights_sha256")
    assert (address, found) == ("models:/facts/1", {"step": 3, "dataset": "", **facts})
    assert digest == weights_digest(find_model(address, uri).folder)


def test_an_alias_moves_to_a_version_and_says_why(uri: str, folder: Path) -> None:
    with open_run(uri) as tracker:
        publish(tracker, folder, name="aliased", alias="candidate")
    assert alias_address("aliased", "champion", uri) is None
    move_alias("models:/aliased/1", "champion", uri, {"fewstep.promoted": "it dominates"})
    assert alias_address("aliased", "champion", uri) == "models:/aliased/1"
    version = open_client(uri, create=False).get_model_version_by_alias("aliased", "champion")
    assert version.tags["fewstep.promoted"] == "it dominates"
    with pytest.raises(ConfigError, match="models:/aliased@champion"):
        alias_address("unheard-of", "champion", uri)


def mlflow_names(uri: str) -> set[str]:
    return {found.name for found in open_client(uri, create=False).search_registered_models()}


def test_an_address_that_leads_nowhere_names_those_that_do(uri: str, folder: Path) -> None:
    with open_run(uri) as tracker:
        publish(tracker, folder, name="known")
    for address in ("models:/unknown@champion", "models:/known@candidate", "models:/known/99"):
        with pytest.raises(ConfigError, match="models:/known@champion") as refused:
            find_model(address, uri)
        assert address in str(refused.value)
    with pytest.raises(ConfigError, match="models:/NAME@ALIAS"):
        find_model("models:/known", uri)


def test_a_store_that_lost_its_files_says_so(tmp_path: Path, folder: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    with open_run(sqlite_uri(before)) as tracker:
        publish(tracker, folder, name="moved")
    before.rename(after)
    with pytest.raises(CheckpointError, match="moved run folder"):
        find_model("models:/moved@champion", sqlite_uri(after))


def test_without_a_registry_the_folder_is_the_address(folder: Path) -> None:
    tracker = MemoryTracker()
    address = publish_model(
        tracker, folder, name="tiny", alias="champion", metrics={}, input_example="a", policy=POLICY
    )
    assert address == str(folder)
    assert tracker.models[0].max_tokens == 64


@pytest.mark.timeout(600)
def test_a_server_by_address_does_all_of_it(
    database_server: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with open_run(database_server) as tracker:
        tracker.log_metrics({"train/loss": 1.0}, step=0)
        model_uri = publish(tracker, folder, name="remote")
    fetched = find_model(model_uri, database_server).folder
    assert fetched.is_relative_to(tmp_path / "cache")
    assert digests(fetched) == digests(folder)
    written = (fetched / "model.safetensors").stat().st_mtime_ns
    assert find_model(model_uri, database_server).folder == fetched
    assert (fetched / "model.safetensors").stat().st_mtime_ns == written, "fetched twice"
    run = open_client(database_server, create=False).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 1.0)
    assert tracker.page == run_page(tracker.experiment_id, tracker.run_id)
