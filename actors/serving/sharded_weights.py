"""A model folder as an engine over several ranks, and as weights that it can take while it serves."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.ranks import Ranks
from fewstep.actors.engine.rendezvous import Rendezvous
from fewstep.actors.engine.sharded_model import (
    TRIAL,
    ShardedTransformer,
    StagedWeights,
    drop,
    load_sharded,
    staged,
)
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.trial import require_text, torch_dtype, version_of
from fewstep.kernels.model.config import ComputeDtype
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.platform.errors import ActorDied
from fewstep.platform.records import WeightVersion


def open_sharded(
    source: ModelSource,
    *,
    place: Rendezvous,
    listener: int | None,
    max_sequences: int,
    dtype: ComputeDtype,
    memory_bytes: int | None,
) -> Engine:
    """An engine on rank 0; the other ranks come to the same place.

    Args:
        memory_bytes: for keys and values of all ranks together; None = what all sequences can use, at most half of what is
            free where least is.
    Raises:
        CheckpointError: the folder is not a whole model, or a rank cannot read it.
        ActorDied: not all ranks came.
    """
    folder, ranks = Path(source.folder), Ranks(place, 0, listener=listener)
    loaded = load_sharded(ranks, folder, torch_dtype(dtype))
    each = loaded.free_bytes // 2 if memory_bytes is None else memory_bytes // place.num_ranks
    return Engine(
        loaded.model,
        load_tokenizer(folder, loaded.model.config),
        max_sequences=max_sequences,
        weight_version=version_of(source, source.address, loaded.checksum),
        memory_bytes=each,
    )


def proved_sharded(
    model: ShardedTransformer, source: ModelSource, address: str, folder: Path, dtype: ComputeDtype
) -> tuple[StagedWeights, WeightVersion]:
    """Weights that every rank has read its part of, proved by generating a block with them beside those that serve.

    Raises:
        CheckpointError: a rank cannot read them, or they do not generate.
        ActorDied: a rank is gone.
    """
    loaded = load_sharded(model.ranks, folder, torch_dtype(dtype), TRIAL)
    try:
        require_text(address, loaded.model, load_tokenizer(folder, loaded.model.config))
    except Exception:
        with contextlib.suppress(ActorDied):
            drop(model.ranks, TRIAL)
        raise
    return staged(loaded.model), version_of(source, address, loaded.checksum)
