"""`fewstep export`: a model folder that others can load, with a card written from the records of the jobs that made it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from fewstep.kernels.model.checkpoint import check_weights, own_shapes
from fewstep.kernels.model.config import NO_TOKEN, ModelConfig
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.pipelines.export_settings import ExportConfig
from fewstep.pipelines.lineage import MODEL, stages_of
from fewstep.pipelines.model_card import model_card
from fewstep.pipelines.models import pinned_model
from fewstep.platform.artifacts import atomic_folder, weights_digest
from fewstep.platform.errors import ConfigError

CARD = "README.md"


def run(config: ExportConfig) -> None:
    """Write the folder and print what is in it.

    Raises:
        CheckpointError: no model, or one whose weights do not fit its config.json.
        ConfigError: `out` lies in the model's own folder.
        ResourceError: the disk is full.
    """
    folder = _model_folder(config)
    model = ModelConfig.load(folder)
    tokenizer = load_tokenizer(folder, model)
    check_weights(folder, model)
    target = config.out.resolve()
    if target == folder.resolve() or target in folder.resolve().parents or folder.resolve() in target.parents:
        raise ConfigError(
            "out", str(config.out), "a folder apart from the model's", "choose another folder for the export"
        )
    stages = stages_of(folder)
    num_parameters = sum(math.prod(shape) for shape in own_shapes(model).values())
    card = model_card(
        config.name or config.out.name, model, num_parameters, weights_digest(folder), stages, config.license
    )
    with atomic_folder(config.out) as temporary:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith((".", "__")):
                shutil.copyfile(path, temporary / path.name)
        words = {
            name: tokenizer.id_to_token(number)
            for name, number in (("eos_token", model.eos_token_id), ("pad_token", model.pad_token_id),
                                 ("mask_token", model.mask_token_id))
            if number != NO_TOKEN
        }  # fmt: skip
        _write_missing(
            temporary / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": model.max_position_embeddings,
                **words,
            },
        )
        _write_missing(
            temporary / "generation_config.json",
            {"eos_token_id": model.eos_token_id, "pad_token_id": model.pad_token_id},
        )
        (temporary / CARD).write_text(card)
    names = ", ".join(path.name for path in sorted(config.out.iterdir()))
    print(f"wrote {config.out}: {names}", flush=True)


def _model_folder(config: ExportConfig) -> Path:
    """A run's `model`, or the folder as it is."""
    _, folder = pinned_model(config.path, config.tracking_uri)
    inner = folder / MODEL
    return inner if inner.is_dir() and not (folder / "config.json").is_file() else folder


def _write_missing(path: Path, values: dict[str, Any]) -> None:
    if not path.is_file():
        path.write_text(json.dumps(values, indent=2) + "\n")
