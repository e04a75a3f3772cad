"""Checkpoint formats: config.json names a family, the family says how to read fields and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.families.decoder import DECODER_FAMILIES
from fewstep.kernels.model.families.family import Family, Fields, Piece
from fewstep.kernels.model.families.fewstep import FEWSTEP
from fewstep.kernels.model.families.llada import LLADA
from fewstep.kernels.model.families.llada2 import LLADA2
from fewstep.platform.errors import CheckpointError

__all__ = ["FAMILIES", "Family", "Piece", "family_of", "read_config"]

FAMILIES: dict[str, Family] = {family.name: family for family in (FEWSTEP, LLADA, LLADA2, *DECODER_FAMILIES)}


def family_of(config: ModelConfig) -> Family:
    """The adapter that a configuration was read with."""
    return FAMILIES[config.family]


def read_config(folder: Path) -> ModelConfig:
    """`folder/config.json` of any family.

    Raises:
        CheckpointError: no such file, not JSON, a family nobody here knows, or a field that cannot be followed.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            str(path), "no such file", "a model folder in Hugging Face layout", "check the path"
        )
    text = path.read_text()
    try:
        values: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            str(path), f"unreadable ({error})", "a JSON file", "repair or re-export it"
        ) from error
    family = _find(path, values)
    fields = Fields(str(path), values, family.name)
    read = family.read(fields)
    if family is not FEWSTEP:
        read |= {
            "model_type": family.model_type,
            "architectures": values.get("architectures") or family.architectures[:1],
            "torch_dtype": values.get("dtype") or values.get("torch_dtype") or "float32",
            "family": family.name,
            "source": text,
        }
    elif taken := sorted({"family", "source"} & values.keys()):
        raise CheckpointError(f"{path}: {taken[0]}", "a value", "no such key", "remove it")
    try:
        return ModelConfig.model_validate(read)
    except ValidationError as error:
        reason = str(error).replace("\n", " ")[:300]
        raise CheckpointError(
            str(path), reason, f"a configuration of the {family.name} family", "repair or re-export it"
        ) from error


def _find(path: Path, values: dict[str, Any]) -> Family:
    """By model_type, then by architecture: one type may have several, and some of them hold no language model."""
    model_type = values.get("model_type")
    candidates = [family for family in FAMILIES.values() if family.model_type == model_type]
    if not candidates:
        known = sorted({family.model_type for family in FAMILIES.values()})
        raise CheckpointError(
            f"{path}: model_type", repr(model_type), f"one of {', '.join(known)}", "convert the model"
        )
    given = values.get("architectures") or candidates[0].architectures
    for family in candidates:
        if set(given) & set(family.architectures):
            return family
    allowed = [name for family in candidates for name in family.architectures]
    raise CheckpointError(
        f"{path}: architectures", given, f"one of {', '.join(allowed)}", "use a checkpoint of that kind"
    )
