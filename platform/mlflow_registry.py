"""Addresses in MLflow's registry: an alias, a version or a logged model becomes a folder again."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.platform.artifacts import atomic_folder, weights_digest
from fewstep.platform.errors import CheckpointError, ConfigError
from fewstep.platform.mlflow_models import ARTIFACT, DIGEST, WEIGHTS
from fewstep.platform.mlflow_store import import_mlflow, open_client, reporting, shown_uri

# models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-LOGGED_MODEL_ID
_URI = re.compile(
    r"models:/(?:(?P<name>[^/@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))|(?P<model_id>m-[0-9a-f]+))"
)

_LOCAL = ("/", "file:")


@dataclass(frozen=True)
class FoundModel:
    """What an address meant when it was looked up.

    Attributes:
        address: `models:/NAME/VERSION` or `models:/m-ID`: unlike an alias, it means the same thing tomorrow.
        folder: config.json, safetensors, tokenizer.json.
        packed: the folder of the MLflow model, with its MLmodel file.
    """

    address: str
    folder: Path
    packed: Path


def find_model(model_uri: str, tracking_uri: str) -> FoundModel:
    """Looks an address up once; whoever keeps the answer is not touched by an alias that moves.

    Artifacts on this machine are used where they lie. Those of a remote store are fetched once into
    `$XDG_CACHE_HOME/fewstep/models`, by their location, whose content never changes.

    Raises:
        ConfigError: not such an address, no such model, version or alias (names those there are), no such store.
        CheckpointError: the store knows the model, but its files are gone, or no longer what they were.
        ResourceError: the store does not answer.
    """
    address, location = _look_up(model_uri, tracking_uri)
    packed = _local_copy(location, tracking_uri)
    return FoundModel(address, _weights_folder(model_uri, packed), packed)


def find_local_model(model_uri: str, tracking_uri: str) -> Path | None:
    """The folder that `find_model` finds, None where its files would have to be fetched first. Raises as `find_model` does."""
    _, location = _look_up(model_uri, tracking_uri)
    packed = _place(location, tracking_uri)
    return _weights_folder(model_uri, packed) if packed.is_dir() else None


def model_facts(model_uri: str, tracking_uri: str) -> tuple[str, dict[str, Any]]:
    """The address that does not move, and what was measured of the model when it was registered: `step`, `dataset`,
    the facts of its `TrackedModel` and `weights_sha256`, the digest of the weights' files. Nothing but its MLmodel file is fetched.

    Raises:
        UserError: as `find_model` does.
    """
    artifacts, models = import_mlflow("mlflow.artifacts"), import_mlflow("mlflow.models")
    address, location = _look_up(model_uri, tracking_uri)
    with reporting(tracking_uri), tempfile.TemporaryDirectory() as scratch:
        try:
            path = artifacts.download_artifacts(
                artifact_uri=f"{location.rstrip('/')}/MLmodel", dst_path=scratch, tracking_uri=tracking_uri
            )
        except FileNotFoundError as error:
            raise _files_gone(model_uri, location) from error
        return address, dict(models.Model.load(path).metadata or {})


def alias_address(name: str, alias: str, tracking_uri: str) -> str | None:
    """`models:/NAME/VERSION` of an alias; None where the model has no such alias.

    Raises:
        ConfigError: no such model (names those there are), or no such store.
        ResourceError: the store does not answer.
    """
    client, exceptions = open_client(tracking_uri, create=False), import_mlflow("mlflow.exceptions")
    with reporting(tracking_uri):
        try:
            aliases: dict[str, str] = client.get_registered_model(name).aliases
        except exceptions.MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise _unknown(client, tracking_uri, f"models:/{name}") from error
    return f"models:/{name}/{aliases[alias]}" if alias in aliases else None


def model_run(model_uri: str, tracking_uri: str) -> str:
    """The id of the run that made a model. Raises as `find_model` does."""
    client = open_client(tracking_uri, create=False)
    address, _ = _look_up(model_uri, tracking_uri)
    parts = _URI.fullmatch(address)
    assert parts is not None
    with reporting(tracking_uri):
        if parts["model_id"]:
            return str(client.get_logged_model(parts["model_id"]).source_run_id)
        return str(client.get_model_version(parts["name"], parts["version"]).run_id)


def move_alias(address: str, alias: str, tracking_uri: str, tags: Mapping[str, str]) -> None:
    """Points an alias at `models:/NAME/VERSION` and notes on that version why. Raises as `alias_address` does."""
    parts = _URI.fullmatch(address)
    if parts is None or not parts["version"]:
        raise ValueError(f"{address} is not the address of a version")
    client = open_client(tracking_uri, create=False)
    with reporting(tracking_uri):
        for key, value in tags.items():
            client.set_model_version_tag(parts["name"], parts["version"], key, value)
        client.set_registered_model_alias(parts["name"], alias, parts["version"])


def _look_up(model_uri: str, tracking_uri: str) -> tuple[str, str]:
    """The address that does not move, and where the artifacts lie."""
    parts = _URI.fullmatch(model_uri)
    if parts is None:
        raise ConfigError(
            "model", model_uri, "models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID",
            "write it like models:/fewstep-tiny@champion",
        )  # fmt: skip
    client = open_client(tracking_uri, create=False)
    with reporting(tracking_uri):
        return _location(client, tracking_uri, parts, model_uri)


def _location(client: Any, uri: str, parts: re.Match[str], model_uri: str) -> tuple[str, str]:
    """The address that does not move, and where the artifacts of the logged model or registered version lie."""
    exceptions = import_mlflow("mlflow.exceptions")
    name, number = parts["name"], parts["version"]
    try:
        if parts["model_id"]:
            return model_uri, str(client.get_logged_model(parts["model_id"]).artifact_location)
        if parts["alias"]:
            number = client.get_model_version_by_alias(name, parts["alias"]).version
        return f"models:/{name}/{number}", str(client.get_model_version_download_uri(name, number))
    except exceptions.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise _unknown(client, uri, model_uri) from error


def _unknown(client: Any, uri: str, model_uri: str) -> ConfigError:
    known = _known_models(client)
    allowed = f"one of {known}" if known else f"a registered model; {shown_uri(uri)} has none"
    return ConfigError("model", f"{model_uri}, which is not there", allowed, "name one, or a model folder")


def _known_models(client: Any) -> list[str]:
    known = []
    for model in client.search_registered_models(max_results=100):
        known += [f"models:/{model.name}@{alias}" for alias in sorted(model.aliases)]
        versions = client.search_model_versions(f"name = '{model.name}'", max_results=10)
        known += [f"models:/{model.name}/{found.version}" for found in versions]
    return known


def _place(location: str, tracking_uri: str) -> Path:
    """Where artifacts lie on this machine, or would once they are fetched."""
    if location.startswith(_LOCAL):
        return Path(import_mlflow("mlflow.utils.file_utils").local_file_uri_to_path(location))
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(f"{tracking_uri} {location}".encode()).hexdigest()[:32]
    return caches / "fewstep" / "models" / digest / "packed"


def _local_copy(location: str, tracking_uri: str) -> Path:
    packed = _place(location, tracking_uri)
    cache = packed.parent
    if not location.startswith(_LOCAL) and not cache.is_dir():
        artifacts = import_mlflow("mlflow.artifacts")
        cache.parent.mkdir(parents=True, exist_ok=True)
        with reporting(tracking_uri), tempfile.TemporaryDirectory(dir=cache.parent) as landing:
            fetched = artifacts.download_artifacts(
                artifact_uri=location, dst_path=landing, tracking_uri=tracking_uri
            )
            with atomic_folder(cache) as scratch:
                Path(fetched).rename(scratch / "packed")
    return packed


def _weights_folder(model_uri: str, packed: Path) -> Path:
    """The model folder of an MLflow model: inside it, or where a checkpoint's weights were left."""
    flavor: dict[str, Any] = {}
    digest: str | None = None
    if (packed / "MLmodel").is_file():
        described = import_mlflow("mlflow.models").Model.load(str(packed))
        flavor, digest = described.flavors["python_function"], (described.metadata or {}).get(DIGEST)
    reference = (flavor.get("config") or {}).get(WEIGHTS)
    if reference is not None:
        return referenced_folder(model_uri, reference)
    folder = packed / flavor["artifacts"][ARTIFACT]["path"] if flavor else packed
    if not flavor or not folder.is_dir():
        raise _files_gone(model_uri, str(packed))
    if digest is not None and weights_digest(folder) != digest:
        raise CheckpointError(
            model_uri, f"other weights at {folder} than were registered", "the weights of that version",
            "register the model again",
        )  # fmt: skip
    return folder


def _files_gone(model_uri: str, location: str) -> CheckpointError:
    return CheckpointError(
        model_uri, f"no model folder at {location}", "the files this store registered",
        "put them back (artifact paths are absolute: a moved run folder loses them), or register the model again",
    )  # fmt: skip


def referenced_folder(model_uri: str, reference: Mapping[str, str]) -> Path:
    """The folder a checkpoint's weights were left in.

    Args:
        model_uri: what the user calls the model.
        reference: `folder`, and the `sha256` of its weights when they were logged.
    Raises:
        CheckpointError: they are gone, or others are in their place.
    """
    folder = Path(reference["folder"])
    try:
        found = weights_digest(folder)
    except CheckpointError as error:
        raise CheckpointError(
            model_uri, f"no weights at {folder}", "a checkpoint that its run still keeps",
            "name a newer checkpoint, or a registered version, which has a copy of its own",
        ) from error  # fmt: skip
    if found != reference["sha256"]:
        raise CheckpointError(
            model_uri, f"other weights at {folder} than were logged", "the weights of that checkpoint",
            "name a registered version, which has a copy of its own",
        )  # fmt: skip
    return folder
