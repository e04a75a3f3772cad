"""A model folder as an engine, and as weights that an engine can take while it serves; used in the engine's process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.sharded_model import ShardedTransformer
from fewstep.actors.serving.engine_source import EngineOptions
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.sharded_weights import open_sharded, proved_sharded
from fewstep.actors.serving.trial import require_text, torch_dtype, version_of
from fewstep.kernels.model.adapter_folder import load_adapter
from fewstep.kernels.model.checkpoint import load_model, load_state, state_checksum
from fewstep.kernels.model.config import ComputeDtype, ModelConfig
from fewstep.kernels.model.lora import merge_into
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import CheckpointError
from fewstep.platform.records import WeightVersion


def open_engine(source: ModelSource, options: EngineOptions) -> Engine:
    """An engine over a model folder, an adapter merged into its weights if there is one.

    Raises:
        CheckpointError: the folder is not a whole model, or the adapter does not fit it.
        ActorDied: not all ranks came.
    """
    if options.place is not None:
        return open_sharded(
            source,
            place=options.place,
            listener=options.listener,
            max_sequences=options.max_sequences,
            dtype=options.dtype,
            memory_bytes=options.memory_bytes,
        )
    model, tokenizer = load_model(Path(source.folder), torch_dtype(options.dtype))
    if source.adapter:
        factors, scale = load_adapter(Path(source.adapter), model.config)
        merge_into(model.state_dict(), factors, model.config, scale)
    return Engine(
        model,
        tokenizer,
        max_sequences=options.max_sequences,
        weight_version=version_of(source, source.address, state_checksum(model.state_dict())),
        memory_bytes=options.memory_bytes,
    )


def proved_weights(
    engine: Engine, source: ModelSource, address: str, folder: Path, dtype: ComputeDtype
) -> tuple[Mapping[str, torch.Tensor], WeightVersion]:
    """Weights that can take the place of an engine's, proved by generating a block with them beside it.

    Raises:
        CheckpointError: they cannot be loaded, belong to another model or tokenizer, or do not generate.
    """
    config = ModelConfig.load(folder)
    if config != engine.config:
        raise CheckpointError(
            address, "another config.json", "that of the model served", "serve it by itself"
        )
    tokenizer = load_tokenizer(folder, config)
    if tokenizer.to_str() != engine.tokenizer.to_str():
        raise CheckpointError(address, "another tokenizer", "that of the model served", "serve it by itself")
    if isinstance(engine.model, ShardedTransformer):
        return proved_sharded(engine.model, source, address, folder, dtype)
    state = load_state(folder, config, torch_dtype(dtype))
    # On the loaded tensors themselves: no second copy, and requests of the serving engine never see them.
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, assign=True)
    require_text(address, model, tokenizer)
    return state, version_of(source, address, state_checksum(state))
