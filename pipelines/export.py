"""`fewstep export`: a model folder that others can load, with a card written from the records of the jobs that made it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fewstep.kernels.model.adapter_folder import AdapterHeader, check_adapter, load_adapter
from fewstep.kernels.model.checkpoint import check_weights, load_state, own_shapes, save_model
from fewstep.kernels.model.config import NO_TOKEN, ModelConfig
from fewstep.kernels.model.lora import merge_into
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.pipelines.export_settings import ExportConfig
from fewstep.pipelines.lineage import MODEL, stages_of
from fewstep.pipelines.model_card import model_card
from fewstep.pipelines.models import adapter_folder, pinned_model
from fewstep.platform.artifacts import atomic_folder, weights_digest
from fewstep.platform.errors import ConfigError

CARD = "README.md"


def run(config: ExportConfig) -> None:
    """Write the folder and print what is in it.

    Raises:
        CheckpointError: no model, one whose weights do not fit its config.json, or an adapter that does not fit it.
        ConfigError: `out` lies in the model's own folder.
        ResourceError: the disk is full.
    """
    folder = _model_folder(config)
    model = ModelConfig.load(folder)
    tokenizer = load_tokenizer(folder, model)
    check_weights(folder, model)
    adapter = adapter_folder(config.adapter) if config.adapter else None
    header = None if adapter is None else check_adapter(adapter, model)
    for read in (folder, adapter or folder):
        _require_apart(config.out.resolve(), read.resolve())
    # The folder that an adapter was trained into has the record of how, and of what was measured of the merged model.
    stages = stages_of(folder)
    if adapter is not None and (adapter.parent / MODEL).is_dir():
        stages = stages_of(adapter.parent / MODEL) or stages
    with atomic_folder(config.out) as temporary:
        if adapter is None:
            for path in sorted(folder.iterdir()):
                if path.is_file() and not path.name.startswith((".", "__")):
                    shutil.copyfile(path, temporary / path.name)
        else:
            _merge(folder, adapter, model, tokenizer, temporary)
        _write_what_others_read(temporary, model, tokenizer)
        num_parameters = sum(math.prod(shape) for shape in own_shapes(model).values())
        card = model_card(
            config.name or config.out.name, model, num_parameters, weights_digest(temporary), stages, config.license,
            merged="" if header is None else _merged(header, weights_digest(folder)),
        )  # fmt: skip
        (temporary / CARD).write_text(card)
    names = ", ".join(path.name for path in sorted(config.out.iterdir()))
    print(f"wrote {config.out}: {names}", flush=True)


def _require_apart(target: Path, source: Path) -> None:
    if target == source or target in source.parents or source in target.parents:
        raise ConfigError(
            "out", str(target), "a folder apart from the model's", "choose another folder for the export"
        )


def _merge(folder: Path, adapter: Path, model: ModelConfig, tokenizer: Tokenizer, target: Path) -> None:
    """The model with the adapter in its weights, and its other files."""
    factors, scale = load_adapter(adapter, model)
    state = load_state(folder, model)
    merge_into(state, factors, model, scale)
    save_model(target, state, model, tokenizer, folder)


def _merged(header: AdapterHeader, base_digest: str) -> str:
    """The card's sentence about an adapter."""
    other = header.base_digest not in ("", base_digest)
    return (
        f"A LoRA adapter of rank {header.rank}, alpha {header.alpha:g}, on {', '.join(header.target_modules)} is merged into"
        f" weights of digest `{base_digest[:16]}`"
        + (f"; it was trained on others, `{header.base_digest[:16]}`." if other else ".")
    )


def _write_what_others_read(folder: Path, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Settings that transformers looks for, where the model came without them."""
    words = {
        name: tokenizer.id_to_token(number)
        for name, number in (("eos_token", model.eos_token_id), ("pad_token", model.pad_token_id),
                             ("mask_token", model.mask_token_id))
        if number != NO_TOKEN
    }  # fmt: skip
    _write_missing(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.max_position_embeddings,
            **words,
        },
    )
    _write_missing(
        folder / "generation_config.json",
        {"eos_token_id": model.eos_token_id, "pad_token_id": model.pad_token_id},
    )


def _model_folder(config: ExportConfig) -> Path:
    """A run's `model`, or the folder as it is."""
    _, folder = pinned_model(config.path, config.tracking_uri)
    inner = folder / MODEL
    return inner if inner.is_dir() and not (folder / "config.json").is_file() else folder


def _write_missing(path: Path, values: dict[str, Any]) -> None:
    if not path.is_file():
        path.write_text(json.dumps(values, indent=2) + "\n")
