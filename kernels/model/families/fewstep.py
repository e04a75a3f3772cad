"""Our own format: config.json holds the fields of `ModelConfig`, tensors are named as in the transformer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.families.family import Family, Fields, Piece
from fewstep.kernels.model.families.names import tensor_names


def _read(fields: Fields) -> dict[str, Any]:
    return dict(fields.values)


def _pieces(config: ModelConfig) -> Iterator[Piece]:
    return (Piece(name, name) for name in tensor_names(config))


FEWSTEP = Family("fewstep", "fewstep_block_diffusion", ("FewstepBlockDiffusionLM",), _read, _pieces)
