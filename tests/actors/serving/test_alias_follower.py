"""An alias that moves under load: weights swap, requests go on; a bad version is refused and the old one stays."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.actors.engine.sharded_ranks import following
from tests.actors.serving.conftest import listening
from tests.actors.serving.tiny import build_tokenizer, tiny_model

from fewstep.actors.engine.rendezvous import MeetingPoint
from fewstep.actors.serving.alias_follower import AliasFollower
from fewstep.actors.serving.engine_source import EngineOptions
from fewstep.actors.serving.loading import load_service
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.service import CompletionService
from fewstep.cluster.served_models import model_sources
from fewstep.kernels.model.checkpoint import save_model
from fewstep.kernels.model.transformer import Transformer
from fewstep.pipelines.publish import publish_model
from fewstep.platform.errors import CheckpointError, ConfigError, ResourceError
from fewstep.platform.mlflow_registry import find_model, move_alias
from fewstep.platform.mlflow_store import sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import DecodePolicy

ENGINE = EngineOptions(max_sequences=8)
both = pytest.mark.parametrize("num_ranks", [1, 2], indirect=True)
GREEDY: dict[str, Any] = {"model": "served", "prompt": "abcdef", "max_tokens": 32, "temperature": 0}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sqlite_uri(tmp_path_factory.mktemp("store"))


def register(uri: str, folder: Path, model: Transformer, name: str = "served") -> None:
    """One more version, without an alias that is followed."""
    save_model(folder, model.state_dict(), model.config, build_tokenizer())
    with MlflowTracker(uri, experiment="serving", run_name=folder.name, system_metrics=False) as tracker:
        publish_model(
            tracker,
            folder,
            name=name,
            alias="newest",
            metrics={},
            input_example="def f(",
            policy=DecodePolicy(),
        )


def model_of(seed: int, context: int = 2048) -> Transformer:
    """For two ranks, too."""
    config = tiny_model(build_tokenizer(), context).config
    model = Transformer(config.model_copy(update={"num_key_value_heads": 2}))
    model.initialise(seed)
    return model.eval()


@pytest.fixture(scope="module")
def versions(uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """1 and 2 work, 3 has weights that are no numbers, 4 is of another shape, 5 is damaged after its registration."""
    folder = tmp_path_factory.mktemp("models")
    broken = model_of(5)
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(torch.nan)
    for number, model in enumerate(
        (model_of(3), model_of(4), broken, model_of(3, context=1024), model_of(6)), start=1
    ):
        register(uri, folder / f"v{number}", model)
    weights = find_model("models:/served/5", uri).folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    return uri


@pytest.fixture
def source(versions: str) -> ModelSource:
    move_alias("models:/served/1", "champion", versions, {})
    (found,) = model_sources("models:/served@champion", "", versions)
    return found


@pytest.fixture
def num_ranks(request: pytest.FixtureRequest) -> int:
    """That share the model, where the test asks for several."""
    return getattr(request, "param", 1)


@pytest.fixture
def service(source: ModelSource, num_ranks: int) -> Iterator[CompletionService]:
    with loaded(source, num_ranks) as made:
        yield made


@contextmanager
def loaded(source: ModelSource, num_ranks: int) -> Iterator[CompletionService]:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        options = ENGINE
        if num_ranks > 1:
            meeting = stack.enter_context(closing(MeetingPoint("127.0.0.1", num_ranks, 60.0)))
            stack.enter_context(following(meeting.place))
            options = replace(ENGINE, place=meeting.place, listener=meeting.fileno())
        made = load_service(source, DecodePolicy(), 24, options, num_threads=1)
        stack.callback(made.host.close)
        yield made


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(url: str) -> str:
    response = httpx.post(f"{url}/v1/completions", json=GREEDY, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_a_source_knows_its_version_and_alias(source: ModelSource, versions: str) -> None:
    assert (source.name, source.address, source.alias) == ("served", "models:/served/1", "champion")
    assert source.registered_name == "served"
    (pinned,) = model_sources("models:/served/2", "other", versions)
    assert (pinned.name, pinned.address, pinned.alias) == ("other", "models:/served/2", "")


@both
def test_weights_swap_under_load_without_a_lost_request(
    service: CompletionService, source: ModelSource, versions: str
) -> None:
    follower = AliasFollower(service, source, "saved", 0.05)
    failures: list[str] = []
    texts: set[str] = set()
    done = threading.Event()

    def load(url: str) -> None:
        while not done.is_set():
            with httpx.stream(
                "POST", f"{url}/v1/completions", json={**GREEDY, "stream": True}, timeout=60
            ) as answer:
                lines = [line for line in answer.iter_lines() if line]
            events = [json.loads(line[6:]) for line in lines[:-1]]
            if answer.status_code != 200 or lines[-1] != "data: [DONE]" or "error" in events[-1]:
                failures.append("\n".join(lines))
            texts.add("".join(event["choices"][0]["text"] for event in events))

    with listening(service) as url:
        first = ask(url)
        readers = [threading.Thread(target=load, args=(url,)) for _ in range(4)]
        for reader in readers:
            reader.start()
        follower.start()
        try:
            until(lambda: first in texts)
            for number in (2, 1, 2):
                move_alias(f"models:/served/{number}", "champion", versions, {})
                until(lambda address=f"models:/served/{number}": service.origin.address == address)
            second = ask(url)
            until(lambda: second in texts)
        finally:
            done.set()
            for reader in readers:
                reader.join()
            follower.close()
        health = httpx.get(f"{url}/health").json()
    assert failures == []
    assert service.host.measures()["weight_swaps"] == 3
    assert second != first
    assert health["models"]["served"]["origin"] == {
        "address": "models:/served/2",
        "parent": "",
        "refused": "",
    }
    assert health["weight_version"].startswith("served:2:")


@pytest.mark.parametrize(
    ("number", "says", "num_ranks"),
    [
        (3, "do not generate", 1),
        (3, "do not generate", 2),
        (4, "another config.json", 1),
        (5, "other weights at", 1),
    ],
    indirect=["num_ranks"],
)
def test_a_version_that_cannot_serve_is_refused_and_the_old_one_stays(
    service: CompletionService, source: ModelSource, versions: str, number: int, says: str
) -> None:
    follower = AliasFollower(service, source, "saved", 60)
    with listening(service) as url:
        before = ask(url)
        move_alias(f"models:/served/{number}", "champion", versions, {})
        assert not follower.check()
        assert says in service.origin.refused
        assert service.origin.address == "models:/served/1"
        assert ask(url) == before
        assert httpx.get(f"{url}/ready").status_code == 200
        # Not again until the alias moves; then the next good one is taken.
        refused = service.origin
        assert not follower.check()
        assert service.origin is refused
        move_alias("models:/served/2", "champion", versions, {})
        assert follower.check()
        assert (service.origin.refused, service.origin.address) == ("", "models:/served/2")
        assert ask(url) != before


@both
def test_the_swapped_weights_are_the_versions_own(
    service: CompletionService, source: ModelSource, versions: str, num_ranks: int
) -> None:
    move_alias("models:/served/2", "champion", versions, {})
    assert AliasFollower(service, source, "saved", 60).check()
    (fresh_source,) = model_sources("models:/served/2", "", versions)
    with loaded(fresh_source, num_ranks) as fresh:
        with listening(service) as swapped, listening(fresh) as plain:
            assert ask(swapped) == ask(plain)
        versions_of = [each.host.stats()["weight_version"] for each in (service, fresh)]
        assert versions_of[0] == versions_of[1]


def test_damaged_files_are_refused_at_the_start_too(versions: str) -> None:
    with pytest.raises(CheckpointError, match="other weights at"):
        model_sources("models:/served/5", "", versions)


def test_a_registry_that_is_gone_leaves_the_weights(
    service: CompletionService, source: ModelSource, tmp_path: Path
) -> None:
    gone = ModelSource(
        source.name, source.folder, source.address, source.alias, sqlite_uri(tmp_path / "nowhere")
    )
    with pytest.raises((ConfigError, ResourceError)):
        AliasFollower(service, gone, "saved", 60).check()
    assert service.host.measures()["weight_swaps"] == 0


def test_models_of_one_name_and_a_name_for_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two models named 'served'"):
        model_sources((str(tmp_path / "a" / "served"), str(tmp_path / "b" / "served")), "", "")
    with pytest.raises(ConfigError, match="for 2 models"):
        model_sources(("a", "b"), "one", "")
