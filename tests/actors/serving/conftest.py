"""A random tiny model behind the real application, on a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from openai import OpenAI
from tests.actors.serving.tiny import build_tokenizer, save_tiny, tiny_model
from tokenizers import Tokenizer

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.host import EngineHost
from fewstep.actors.serving.app import create_app
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.desk import Desk
from fewstep.actors.serving.service import CompletionService, ServedModel
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.records import DecodePolicy, WeightVersion


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def serving(name: str, folder: Path, **settings: Any) -> Iterator[CompletionService]:
    """A tiny model with that chat template, served until the generator is closed."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = tiny_model(tokenizer, **settings)
    host = host_of(model, tokenizer)
    served = ServedModel(
        name=name,
        created=1_700_000_000,
        config=model.config,
        tokenizer=tokenizer,
        chat=ChatTemplate(folder),
        policy=DecodePolicy(threshold=0.5),
        max_tokens=24,
    )
    yield CompletionService(host, served)
    host.close()


@pytest.fixture(scope="module")
def service(model_folder: Path) -> Iterator[CompletionService]:
    yield from serving("tiny", model_folder)


@pytest.fixture(scope="module")
def bidirectional(model_folder: Path) -> Iterator[CompletionService]:
    """A model that sees both sides of a hole, whose chat template is not empty."""
    folder = model_folder.parent / "bidirectional"
    folder.mkdir(exist_ok=True)
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}>"
    (folder / "chat_template.jinja").write_text(template)
    yield from serving("both", folder, attention_kind="bidirectional")


def host_of(model: Transformer, tokenizer: Tokenizer) -> EngineHost:
    version = WeightVersion("test", 0, "0" * 32)
    return EngineHost(partial(Engine, model, tokenizer, max_sequences=8, weight_version=version))


@contextmanager
def listening(*services: CompletionService, desk: Desk | None = None) -> Iterator[str]:
    """The application on a real socket; its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(*services, desk=desk), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(service: CompletionService) -> Iterator[str]:
    with listening(service) as found:
        yield found


@pytest.fixture(scope="module")
def url_of_both(service: CompletionService, bidirectional: CompletionService) -> Iterator[str]:
    with listening(service, bidirectional) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def client_of_both(url_of_both: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url_of_both}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
