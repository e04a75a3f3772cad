"""Weights on trial: what a version is called, and whether it generates."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.serving.model_source import ModelSource
from fewstep.kernels.model.config import ComputeDtype
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import CheckpointError, RequestError
from fewstep.platform.records import DecodePolicy, WeightVersion


def torch_dtype(dtype: ComputeDtype) -> torch.dtype | None:
    """None = as the checkpoint has it."""
    if dtype == "saved":
        return None
    found: torch.dtype = getattr(torch, dtype)
    return found


def require_text(address: str, model: Transformer, tokenizer: Tokenizer) -> None:
    """Let a model write one block by itself.

    Raises:
        CheckpointError: it does not generate.
    """
    config = model.config
    engine = Engine(model, tokenizer, max_sequences=1, weight_version=WeightVersion("trial", 0, "0"))
    trial = Request("trial", (config.eos_token_id,), DecodePolicy(), config.block_size, ignore_eos=True)
    try:
        engine.generate([trial])
    except RequestError as error:
        raise CheckpointError(
            address, f"weights that do not generate ({error.got})", "a model", "register a working version"
        ) from error


def version_of(source: ModelSource, address: str, checksum: str) -> WeightVersion:
    """What weights of an address are called."""
    number = address.rpartition("/")[2]
    return WeightVersion(source.name, int(number) if number.isdigit() else 0, checksum)
