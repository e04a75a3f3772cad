"""Which models `fewstep serve` was asked for: addresses to folders, and what can be wrong with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from fewstep.actors.serving.model_source import ModelSource
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.sharding import require_shardable
from fewstep.platform.config import Config
from fewstep.platform.errors import ConfigError

_ALIAS = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[\w-]+)")


class AdaptedModel(Config):
    """A model with a LoRA adapter merged into its weights as it is loaded: a model of its own, beside the one below it."""

    model: str = ""
    """The model below: a folder, models:/NAME@ALIAS (the version that the alias names at the start), or empty for the
    embedded model."""
    adapter: str = Field(min_length=1)
    """Folder of the adapter in PEFT's format, or of the run that trained it."""
    name: str = ""
    """What clients pass as `model`; empty = the name of the adapter's folder."""


Entry = str | AdaptedModel


def model_sources(models: Entry | Sequence[Entry], name: str, tracking_uri: str) -> tuple[ModelSource, ...]:
    """The models to serve, each with a name of its own.

    Args:
        models: one entry or several: a folder, `models:/NAME@ALIAS`, empty for the embedded model, or one of these with an
            adapter.
        name: of the only model; empty = the folder's or the registered model's.
        tracking_uri: as `model_folder`'s.
    Raises:
        UserError: an address does not resolve, two models would have one name, or `name` is given for several.
    """
    entries = (models,) if isinstance(models, str | AdaptedModel) else tuple(models)
    if not entries:
        raise ConfigError(
            "model", "an empty list", "at least one model", "name a model, or leave the key out"
        )
    if name and len(entries) > 1:
        raise ConfigError(
            "name", f"{name!r} for {len(entries)} models", "a name for one model", "leave it out"
        )
    sources = tuple(_source(entry, name, tracking_uri) for entry in entries)
    names = [source.name for source in sources]
    for found in names:
        if names.count(found) > 1:
            raise ConfigError(
                "model", f"two models named {found!r}", "models of different names",
                "rename a folder, or give an adapter a name",
            )  # fmt: skip
    return sources


def check_model(source: ModelSource, digest: Callable[[Path], str]) -> None:
    """Everything a replica would stumble over: files, tokenizer, weights, chat template, adapter.

    Args:
        digest: as `adapter_folder.check_base` takes it.
    Raises:
        CheckpointError: what is wrong with the folder, or with the adapter on it.
    """
    # Late: the parsing of `fewstep serve` needs no torch.
    from fewstep.actors.serving.chat import ChatTemplate
    from fewstep.kernels.model.adapter_folder import check_adapter, check_base
    from fewstep.kernels.model.checkpoint import check_weights
    from fewstep.kernels.model.tokenizer_file import load_tokenizer

    folder = Path(source.folder)
    config = ModelConfig.load(folder)
    load_tokenizer(folder, config)
    check_weights(folder, config)
    ChatTemplate(folder)
    if source.adapter:
        check_base(check_adapter(Path(source.adapter), config), folder, digest)


def check_sharding(source: ModelSource, num_ranks: int) -> None:
    """Whether a model can be shared among so many ranks.

    Raises:
        ConfigError: its sizes do not allow that number, or it has an adapter.
    """
    if num_ranks == 1:
        return
    if source.adapter:
        raise ConfigError(
            "tensor_parallel", f"{num_ranks}, and {source.name!r} has an adapter", "1 with adapters",
            "`fewstep export` it merged, and serve that",
        )  # fmt: skip
    require_shardable(ModelConfig.load(Path(source.folder)), num_ranks)


def _source(entry: Entry, name: str, tracking_uri: str) -> ModelSource:
    if isinstance(entry, str):
        return _plain_source(entry, name, tracking_uri)
    from fewstep.pipelines.models import adapter_folder

    base, adapter = _plain_source(entry.model, "", tracking_uri), adapter_folder(entry.adapter).resolve()
    # An adapter is for the weights that it was trained on, so an alias that moves is not followed.
    return replace(
        base, name=name or entry.name or adapter.name, alias="", adapter=str(adapter), parent=base.name
    )


def _plain_source(address: str, name: str, tracking_uri: str) -> ModelSource:
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
