"""Adapter folders as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fewstep.kernels.model.checkpoint import own_shapes, source_shape
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.lora import DOWN, UP, Factors
from fewstep.kernels.model.lora_settings import (
    LoraSettings,
    chosen_modules,
    mergeable_modules,
    peft_targets,
)
from fewstep.platform.artifacts import atomic_folder, weights_digest
from fewstep.platform.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_NAME = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight")
_BASE_DIGEST = "base_sha256"
# Options that change nothing of what the tensors say: how they were trained, and what PEFT itself chooses modules by.
_SILENT = frozenset(
    ("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "target_modules",
     "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config",
     "base_model_name_or_path", "peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights")
)  # fmt: skip
# Other values also change the model that the adapter is for.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter folder says without its numbers.

    Attributes:
        scale: of B A, from alpha, rank and PEFT's `use_rslora`.
        target_modules: as PEFT has them, a list or a pattern.
        base: `base_model_name_or_path`; base_digest: of its weights, if Fewstep made the adapter. Both may be empty.
        shapes: of every tensor, by module and kind (`Factors`' names).
        num_bytes: of the tensors.
    """

    folder: Path
    rank: int
    alpha: float
    scale: float
    target_modules: tuple[str, ...]
    base: str
    base_digest: str
    shapes: Mapping[str, tuple[int, ...]]
    num_bytes: int

    @property
    def modules(self) -> list[str]:
        return [name.removesuffix(DOWN) for name in self.shapes if name.endswith(DOWN)]


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter and not a model."""
    return (Path(folder) / CONFIG_FILE).is_file()


def save_adapter(
    folder: Path, factors: Factors, settings: LoraSettings, config: ModelConfig, base: str, base_digest: str
) -> None:
    """Write an adapter folder, whole or not at all; an older one of that name is replaced.

    Args:
        factors: of the modules that `settings` names in the model of `config`, stored as float32.
        base: what the model is called, for `base_model_name_or_path`; base_digest: of its weights.
    Raises:
        CheckpointError: the folder cannot be written. ResourceError: the disk is full.
    """
    content: dict[str, Any] = {
        "peft_type": "LORA",
        # None, because a diffusion model is asked otherwise than a causal one: PEFT then adds no method of its own.
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": peft_targets(config, chosen_modules(config, settings.target_modules)),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = {_PREFIX + name: tensor.detach().cpu().float().contiguous() for name, tensor in factors.items()}
    try:
        with atomic_folder(Path(folder)) as temporary:
            save_file(
                tensors,
                str(temporary / WEIGHTS_FILE),
                metadata={"format": "pt", _BASE_DIGEST: base_digest},
            )
            (temporary / WEIGHTS_FILE).chmod(0o644)  # safetensors makes its file readable by the owner alone
            (temporary / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            str(folder), str(error), "a writable folder", "check its permissions"
        ) from error


def read_header(folder: Path) -> AdapterHeader:
    """An adapter's settings, names and shapes.

    Raises:
        CheckpointError: no adapter, an option that is not followed here, or a tensor that is no A or B of a linear layer.
    """
    folder = Path(folder)
    values = _read_config(folder / CONFIG_FILE)
    rank, alpha = values["r"], float(values["lora_alpha"])
    shapes, num_bytes, metadata = _read_shapes(folder)
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0 if name.endswith(DOWN) else 1] != rank:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: {_PREFIX}{name}", f"shape {shape}", f"rank {rank} of {CONFIG_FILE}",
                "use the adapter_config.json of these weights",
            )  # fmt: skip
    targets = values.get("target_modules") or ()
    return AdapterHeader(
        folder, rank, alpha, alpha / (sqrt(rank) if values.get("use_rslora") else rank),
        (targets,) if isinstance(targets, str) else tuple(targets), values.get("base_model_name_or_path") or "",
        metadata.get(_BASE_DIGEST, ""), shapes, num_bytes,
    )  # fmt: skip


def check_adapter(folder: Path, config: ModelConfig) -> AdapterHeader:
    """An adapter's header, fitting a model; no tensor is read.

    Raises:
        CheckpointError: as `read_header`, or the model has no such module, or one of another shape: names it.
    """
    header = read_header(folder)
    modules, shapes = mergeable_modules(config), own_shapes(config)
    for name, shape in header.shapes.items():
        module, is_down = name.removesuffix(DOWN).removesuffix(UP), name.endswith(DOWN)
        where = f"{header.folder / WEIGHTS_FILE}: {_PREFIX}{name}"
        if module not in modules:
            raise CheckpointError(
                where, f"no module {module} in the {config.family} model", "modules of the base model",
                "use the model that the adapter was trained on",
            )  # fmt: skip
        outputs, inputs = source_shape(modules[module], shapes)
        expected = (header.rank, inputs) if is_down else (outputs, header.rank)
        if shape != expected:
            raise CheckpointError(
                where,
                f"shape {shape}",
                f"{expected} for this base model",
                "use the model that it was trained on",
            )
        if module + (UP if is_down else DOWN) not in header.shapes:
            raise CheckpointError(where, "one half", "A and B of each module", "copy the folder again")
    return header


def check_base(header: AdapterHeader, base: Path, digest: Callable[[Path], str] = weights_digest) -> None:
    """Whether a model's weights are those that the adapter was trained on; nothing is known of an adapter without a digest.

    Args:
        digest: of a model's files, which it reads whole; whoever has several adapters on a model keeps it.
    Raises:
        CheckpointError: they are others.
    """
    if header.base_digest and (found := digest(base)) != header.base_digest:
        raise CheckpointError(
            f"adapter {header.folder}", f"weights of digest {found[:16]} below it, in {base}",
            f"those that it was trained on, {header.base_digest[:16]}", f"put it on {header.base or 'that model'}",
        )  # fmt: skip


def load_adapter(folder: Path, config: ModelConfig) -> tuple[dict[str, torch.Tensor], float]:
    """A and B of every module and the scale of their product, checked against a model.

    Raises:
        CheckpointError: as `check_adapter`.
    """
    header = check_adapter(folder, config)
    tensors = load_file(str(header.folder / WEIGHTS_FILE))
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}, header.scale


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise TypeError(f"{type(values).__name__} at its root")
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            str(path), f"unreadable ({error})", "an adapter folder as PEFT writes it", "check the path"
        ) from error
    _refuse_options(path, values)
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{path}: r", repr(rank), "a rank of at least 1", "use another adapter")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(f"{path}: lora_alpha", repr(alpha), "a number", "use another adapter")
    return values


def _refuse_options(path: Path, values: Mapping[str, Any]) -> None:
    """Every option that would change the arithmetic in a way nobody follows here, by its name."""
    wrong = {name: value for name, value in values.items() if name not in _SILENT and value}
    if values.get("peft_type") != "LORA":
        wrong = {"peft_type": values.get("peft_type")}
    elif values.get("bias", "none") != "none":
        wrong["bias"] = values["bias"]
    elif values.get("init_lora_weights") not in _INITIALISATIONS:
        wrong["init_lora_weights"] = values["init_lora_weights"]
    if wrong:
        name, value = min(wrong.items())
        allowed = {
            "peft_type": "LORA",
            "bias": "none",
            "init_lora_weights": "one that leaves the base model as it is",
        }
        raise CheckpointError(
            f"{path}: {name}", repr(value), allowed.get(name, "nothing: it is not supported"),
            "merge the adapter with PEFT, and use the merged model",
        )  # fmt: skip


def _read_shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], int, dict[str, str]]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            str(path), "no such file" + (", but adapter_model.bin" if pickled else ""), "a safetensors file",
            "save the adapter as safetensors; pickles are not read" if pickled else "check the path",
        )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    num_bytes = 0
    try:
        with safe_open(str(path), framework="pt") as reader:
            metadata = reader.metadata() or {}
            for key in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                if _NAME.fullmatch(key) is None:
                    raise CheckpointError(
                        f"{path}: {key}", "a tensor that is no A or B of a linear layer",
                        f"{_PREFIX}MODULE{DOWN} and {UP}", "merge the adapter with PEFT, and use the merged model",
                    )  # fmt: skip
                shapes[key.removeprefix(_PREFIX)] = tuple(reader.get_slice(key).get_shape())
        num_bytes = path.stat().st_size
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            str(path), f"unreadable ({error})", "a whole safetensors file", "copy it again"
        ) from error
    return shapes, num_bytes, metadata
