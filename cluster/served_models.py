"""Which models `fewstep serve` was asked for: addresses to folders, and what can be wrong with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fewstep.actors.serving.model_source import ModelSource
from fewstep.platform.errors import ConfigError

_ALIAS = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[\w-]+)")


def model_sources(models: str | Sequence[str], name: str, tracking_uri: str) -> tuple[ModelSource, ...]:
    """The models to serve, each with a name of its own.

    Args:
        models: one address or several: a folder, `models:/NAME@ALIAS`, or empty for the embedded model.
        name: of the only model; empty = the folder's or the registered model's.
        tracking_uri: as `model_folder`'s.
    Raises:
        UserError: an address does not resolve, two models would have one name, or `name` is given for several.
    """
    addresses = (models,) if isinstance(models, str) else tuple(models)
    if not addresses:
        raise ConfigError(
            "model", "an empty list", "at least one model", "name a model, or leave the key out"
        )
    if name and len(addresses) > 1:
        raise ConfigError(
            "name", f"{name!r} for {len(addresses)} models", "a name for one model", "leave it out"
        )
    sources = tuple(_source(address, name, tracking_uri) for address in addresses)
    names = [source.name for source in sources]
    for found in names:
        if names.count(found) > 1:
            raise ConfigError(
                "model", f"two models named {found!r}", "models of different names", "rename a folder"
            )
    return sources


def check_model(folder: Path) -> None:
    """Everything a replica would stumble over: files, tokenizer, weights, chat template.

    Raises:
        CheckpointError: what is wrong with the folder.
    """
    # Late: the parsing of `fewstep serve` needs no torch.
    from fewstep.actors.serving.chat import ChatTemplate
    from fewstep.kernels.model.checkpoint import check_weights
    from fewstep.kernels.model.config import ModelConfig
    from fewstep.kernels.model.tokenizer_file import load_tokenizer

    config = ModelConfig.load(folder)
    load_tokenizer(folder, config)
    check_weights(folder, config)
    ChatTemplate(folder)


def _source(address: str, name: str, tracking_uri: str) -> ModelSource:
    from fewstep.pipelines.models import model_folder

    if not address.startswith("models:/"):
        folder = model_folder(address, tracking_uri).resolve()
        return ModelSource(name or folder.name, str(folder))
    from fewstep.platform.mlflow_registry import find_model
    from fewstep.platform.mlflow_store import project_uri

    uri = project_uri(tracking_uri)
    found, parts = find_model(address, uri), _ALIAS.fullmatch(address)
    registered = address.removeprefix("models:/").partition("@")[0].partition("/")[0]
    return ModelSource(
        name or registered, str(found.folder.resolve()), found.address, parts["alias"] if parts else "", uri
    )
