"""A model folder as a service, and as weights that an engine can take while it serves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.host import EngineHost
from fewstep.actors.engine.request import Request
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.service import CompletionService, Origin, ServedModel, created_of
from fewstep.kernels.model.checkpoint import load_model, load_state, load_tokenizer, state_checksum
from fewstep.kernels.model.config import ComputeDtype, ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import CheckpointError, RequestError
from fewstep.platform.records import DecodePolicy, WeightVersion

logger = logging.getLogger(__name__)


def load_service(
    source: ModelSource,
    policy: DecodePolicy,
    max_tokens: int,
    *,
    max_sequences: int,
    dtype: ComputeDtype,
    memory_bytes: int | None,
) -> CompletionService:
    """An engine over a model folder, on a thread of its own, behind a service.

    Args:
        policy, max_tokens: of requests that do not say; others: as `Engine`'s.
    Raises:
        CheckpointError: the folder is not a whole model.
    """
    folder = Path(source.folder)
    model, tokenizer = load_model(folder, torch_dtype(dtype))
    version = _version_of(source, source.address, state_checksum(model.state_dict()))
    engine = Engine(
        model,
        tokenizer,
        max_sequences=max_sequences,
        weight_version=version,
        memory_bytes=memory_bytes,
    )
    served = ServedModel(
        source.name, created_of(folder), model.config, tokenizer, ChatTemplate(folder), policy, max_tokens
    )
    return CompletionService(EngineHost(engine), served, Origin(source.address or source.folder))


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
    state = load_state(folder, config, torch_dtype(dtype))
    _require_text(address, config, tokenizer, state)
    return state, _version_of(source, address, state_checksum(state))


def torch_dtype(dtype: ComputeDtype) -> torch.dtype | None:
    """None = as the checkpoint has it."""
    if dtype == "saved":
        return None
    found: torch.dtype = getattr(torch, dtype)
    return found


def _require_text(
    address: str, config: ModelConfig, tokenizer: Tokenizer, state: Mapping[str, torch.Tensor]
) -> None:
    # On the loaded tensors themselves: no second copy, and requests of the serving engine never see them.
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(dict(state), assign=True)
    engine = Engine(model, tokenizer, max_sequences=1, weight_version=WeightVersion("trial", 0, "0"))
    trial = Request("trial", (config.eos_token_id,), DecodePolicy(), config.block_size, ignore_eos=True)
    try:
        engine.generate([trial])
    except RequestError as error:
        raise CheckpointError(
            address, f"weights that do not generate ({error.got})", "a model", "register a working version"
        ) from error


def _version_of(source: ModelSource, address: str, checksum: str) -> WeightVersion:
    number = address.rpartition("/")[2]
    return WeightVersion(source.name, int(number) if number.isdigit() else 0, checksum)
