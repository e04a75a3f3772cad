"""A model folder as a service: the engine in a process of its own, the text on either side of it here. Free of torch."""

from __future__ import annotations

from pathlib import Path

from fewstep.actors.engine.host import EngineHost
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.engine_source import EngineOptions, EngineSource
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.service import CompletionService, Origin, ServedModel, created_of
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.platform.records import DecodePolicy


def load_service(
    source: ModelSource, policy: DecodePolicy, max_tokens: int, options: EngineOptions, num_threads: int
) -> CompletionService:
    """A service over a model folder, its engine's process included.

    Args:
        policy, max_tokens: of requests that do not say; num_threads: of torch in the engine's process.
    Raises:
        CheckpointError: the folder is not a whole model.
        ActorDied: the engine's process ended before it served.
    """
    folder = Path(source.folder)
    chat, created = ChatTemplate(folder), created_of(Path(source.weights))
    inherited = () if options.listener is None else (options.listener,)
    host = EngineHost(EngineSource(source, options, num_threads), inherited)
    # Read by the engine's process already, so it is there and fits.
    tokenizer = load_tokenizer(folder, host.config)
    served = ServedModel(source.name, created, host.config, tokenizer, chat, policy, max_tokens)
    address = source.adapter or source.address or source.folder
    return CompletionService(host, served, Origin(address, parent=source.parent))
