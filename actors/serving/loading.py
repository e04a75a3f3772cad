"""A model folder as a service, and as weights that an engine can take while it serves."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.host import EngineHost
from fewstep.actors.engine.rendezvous import Rendezvous
from fewstep.actors.engine.sharded_model import ShardedTransformer
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.service import CompletionService, Origin, ServedModel, created_of
from fewstep.actors.serving.sharded_weights import open_sharded, proved_sharded
from fewstep.actors.serving.trial import require_text, torch_dtype, version_of
from fewstep.kernels.model.checkpoint import load_model, load_state, load_tokenizer, state_checksum
from fewstep.kernels.model.config import ComputeDtype, ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import CheckpointError
from fewstep.platform.records import DecodePolicy, WeightVersion


def load_service(
    source: ModelSource,
    policy: DecodePolicy,
    max_tokens: int,
    *,
    max_sequences: int,
    dtype: ComputeDtype,
    memory_bytes: int | None,
    place: Rendezvous | None = None,
) -> CompletionService:
    """An engine over a model folder, on a thread of its own, behind a service.

    Args:
        policy, max_tokens: of requests that do not say; others: as `Engine`'s.
        place: where the model's ranks meet, of which this process becomes the first; None = it is not sharded.
    Raises:
        CheckpointError: the folder is not a whole model.
    """
    folder = Path(source.folder)
    opened = open_engine if place is None else partial(open_sharded, place=place)
    engine = opened(source, max_sequences=max_sequences, dtype=dtype, memory_bytes=memory_bytes)
    served = ServedModel(
        source.name,
        created_of(folder),
        engine.config,
        engine.tokenizer,
        ChatTemplate(folder),
        policy,
        max_tokens,
    )
    return CompletionService(EngineHost(engine), served, Origin(source.address or source.folder))


def open_engine(
    source: ModelSource, *, max_sequences: int, dtype: ComputeDtype, memory_bytes: int | None
) -> Engine:
    """An engine over the whole model in this process.

    Raises:
        CheckpointError: the folder is not a whole model.
    """
    model, tokenizer = load_model(Path(source.folder), torch_dtype(dtype))
    return Engine(
        model,
        tokenizer,
        max_sequences=max_sequences,
        weight_version=version_of(source, source.address, state_checksum(model.state_dict())),
        memory_bytes=memory_bytes,
    )


def proved_weights(
    service: CompletionService, source: ModelSource, address: str, folder: Path, dtype: ComputeDtype
) -> tuple[dict[str, torch.Tensor], WeightVersion]:
    """Weights that can take the place of a service's, proved by generating a block with them beside the engine.

    Raises:
        CheckpointError: they cannot be loaded, belong to another model or tokenizer, or do not generate.
    """
    config = ModelConfig.load(folder)
    if config != service.model.config:
        raise CheckpointError(
            address, "another config.json", "that of the model served", "serve it by itself"
        )
    tokenizer = load_tokenizer(folder, config)
    if tokenizer.to_str() != service.model.tokenizer.to_str():
        raise CheckpointError(address, "another tokenizer", "that of the model served", "serve it by itself")
    serving = service.host.model
    if isinstance(serving, ShardedTransformer):
        return proved_sharded(serving, source, address, folder, dtype)
    state = load_state(folder, config, torch_dtype(dtype))
    # On the loaded tensors themselves: no second copy, and requests of the serving engine never see them.
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, assign=True)
    require_text(address, model, tokenizer)
    return state, version_of(source, address, state_checksum(state))
