"""Models in MLflow: a folder becomes a logged model and a registered version, and an alias becomes a folder again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fewstep.platform.artifacts import atomic_folder
from fewstep.platform.errors import CheckpointError, ConfigError
from fewstep.platform.mlflow_store import import_mlflow, open_client, reporting, source_tags
from fewstep.platform.tracking import TrackedModel

# models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-LOGGED_MODEL_ID
_URI = re.compile(
    r"models:/(?:(?P<name>[^/@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))|(?P<model_id>m-[0-9a-f]+))"
)
_ARTIFACT = "model"


def register(
    client: Any, uri: str, experiment_id: str, run_id: str, model: TrackedModel, *, dataset_digest: str = ""
) -> str:
    """Logs `model` under a run, registers a new version and moves the alias; returns `models:/NAME@ALIAS`.

    Raises:
        CheckpointError: the model folder does not exist.
        ResourceError: the store failed; a logged model that was begun is marked FAILED and gets no version.
    """
    if not Path(model.folder).is_dir():
        raise CheckpointError(str(model.folder), "no such folder", "a model folder", "write the model first")
    with reporting(uri):
        logged = client.create_logged_model(
            experiment_id, name=model.name, source_run_id=run_id, model_type="diffusion-lm",
            params=_model_params(model), tags=_model_tags(model),
        )  # fmt: skip
        try:
            with tempfile.TemporaryDirectory(prefix="fewstep-model-") as scratch:
                packed = Path(scratch) / "packed"
                _pack(packed, model, logged, run_id)
                client.log_model_artifacts(logged.model_id, str(packed))
        except BaseException:
            client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
        _link(client, run_id, logged.model_id, model, dataset_digest)
        _publish(client, run_id, logged, model)
    return model.uri


def mlflow_model_folder(model_uri: str, tracking_uri: str) -> Path:
    """The local model folder behind `models:/NAME@ALIAS` (or `models:/NAME/VERSION`, `models:/m-ID`).

    Artifacts on this machine are used where they lie. Those of a remote store are fetched once into
    `$XDG_CACHE_HOME/fewstep/models`, by their location, whose content never changes.

    Raises:
        ConfigError: not such an address, no such model or alias (names those there are), no such store.
        CheckpointError: the store knows the model, but its files are gone.
        ResourceError: the store does not answer.
    """
    parts = _URI.fullmatch(model_uri)
    if parts is None:
        raise ConfigError(
            "model", model_uri, "models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID",
            "write it like models:/fewstep-tiny@champion",
        )  # fmt: skip
    client = open_client(tracking_uri, create=False)
    with reporting(tracking_uri):
        location = _location(client, tracking_uri, parts, model_uri)
    packed = _local_copy(location, tracking_uri)
    folder = _weights_folder(packed)
    if folder is None:
        raise CheckpointError(
            model_uri, f"no model folder at {packed}", "the files this store registered",
            "put them back (artifact paths are absolute: a moved run folder loses them), or register the model again",
        )  # fmt: skip
    return folder


def _model_params(model: TrackedModel) -> dict[str, str]:
    return {"step": str(model.step), "max_tokens": str(model.max_tokens), **{
        f"policy.{key}": str(value) for key, value in model.policy.model_dump().items()
    }}  # fmt: skip


def _model_tags(model: TrackedModel) -> dict[str, str]:
    return {"mlflow.note.content": _description(model), **source_tags()}


def _pack(packed: Path, model: TrackedModel, logged: Any, run_id: str) -> None:
    """Writes the MLflow model: code, weights, signature, example, pinned requirements."""
    pyfunc, models = import_mlflow("mlflow.pyfunc"), import_mlflow("mlflow.models")
    pyfunc.save_model(
        path=str(packed),
        python_model=str(model.code),
        artifacts={_ARTIFACT: str(Path(model.folder).resolve())},
        input_example=([model.input_example], call_defaults(model)),
        model_config={"policy": model.policy.model_dump(mode="json"), "max_tokens": model.max_tokens},
        pip_requirements=[f"{name}=={_public_version(name)}" for name in model.requirements],
        mlflow_model=models.Model(
            artifact_path=logged.artifact_location,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
            run_id=run_id,
        ),
    )


def call_defaults(model: TrackedModel) -> dict[str, Any]:
    """What `predict(prompts, params=...)` accepts, with the value each has when it is not given."""
    number = "threshold" if model.policy.kind == "threshold" else "tokens_per_step"
    return {
        "max_tokens": model.max_tokens,
        number: getattr(model.policy, number),
        "temperature": model.policy.temperature,
        "seed": model.policy.seed,
    }


def _public_version(name: str) -> str:
    # A local part (2.13.0+cpu) names one build for one device; no index offers it under that name.
    return version(name).partition("+")[0]


def _link(client: Any, run_id: str, model_id: str, model: TrackedModel, dataset_digest: str) -> None:
    """Ties the model to its run, and the metrics to the model and the data they were measured on."""
    entities = import_mlflow("mlflow.entities")
    client.log_outputs(run_id, [entities.LoggedModelOutput(model_id, step=model.step)])
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[
            entities.Metric(
                key, float(value), now, model.step,
                model_id=model_id, dataset_name=model.dataset or None, dataset_digest=dataset_digest or None,
            )
            for key, value in model.metrics.items()
        ],
    )  # fmt: skip


def _publish(client: Any, run_id: str, logged: Any, model: TrackedModel) -> None:
    exceptions = import_mlflow("mlflow.exceptions")
    try:
        client.create_registered_model(
            model.name, description="Block-diffusion language models made by Fewstep."
        )
    except exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    scores = {key: f"{value:.6g}" for key, value in model.metrics.items()}
    made = client.create_model_version(
        # Not models:/ID: a database registry would look that id up in the process's global store. A server
        # accepts the location only together with the model it belongs to; neither keeps the id, hence the tag.
        model.name, source=logged.artifact_location, run_id=run_id, model_id=logged.model_id,
        description=_description(model), tags={"logged_model": logged.model_id, "step": str(model.step), **scores},
    )  # fmt: skip
    # What MLflow's own register_model leaves, so that the logged model's page shows its versions.
    versions = json.dumps([{"name": made.name, "version": made.version}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": versions})
    client.set_registered_model_alias(model.name, model.alias, made.version)


def _description(model: TrackedModel) -> str:
    return (
        f"Block-diffusion language model after training step {model.step}; "
        f"answers by default with policy {model.policy.label()}, at most {model.max_tokens} tokens.\n\n"
        f"    mlflow.pyfunc.load_model({model.uri!r}).predict([prompt])\n\n"
        f"    fewstep serve --model {model.uri}\n"
    )


def _location(client: Any, uri: str, parts: re.Match[str], model_uri: str) -> str:
    """Where the artifacts of a logged model or of a registered version lie."""
    exceptions = import_mlflow("mlflow.exceptions")
    name, number = parts["name"], parts["version"]
    try:
        if parts["model_id"]:
            return str(client.get_logged_model(parts["model_id"]).artifact_location)
        if parts["alias"]:
            number = client.get_model_version_by_alias(name, parts["alias"]).version
        return str(client.get_model_version_download_uri(name, number))
    except exceptions.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = _known_models(client)
        allowed = f"one of {known}" if known else f"a registered model; {uri} has none"
        raise ConfigError(
            "model", f"{model_uri}, which is not there", allowed, "name one, or a model folder"
        ) from error


def _known_models(client: Any) -> list[str]:
    found = client.search_registered_models(max_results=100)
    return [f"models:/{model.name}@{alias}" for model in found for alias in sorted(model.aliases)]


def _local_copy(location: str, tracking_uri: str) -> Path:
    artifacts, files = import_mlflow("mlflow.artifacts"), import_mlflow("mlflow.utils.file_utils")
    if location.startswith(("/", "file:")):
        return Path(files.local_file_uri_to_path(location))
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = (
        caches / "fewstep" / "models" / hashlib.sha256(f"{tracking_uri} {location}".encode()).hexdigest()[:32]
    )
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with reporting(tracking_uri), tempfile.TemporaryDirectory(dir=cache.parent) as landing:
            fetched = artifacts.download_artifacts(
                artifact_uri=location, dst_path=landing, tracking_uri=tracking_uri
            )
            with atomic_folder(cache) as scratch:
                Path(fetched).rename(scratch / "packed")
    return cache / "packed"


def _weights_folder(packed: Path) -> Path | None:
    """The model folder inside an MLflow model; None when its files are not there."""
    if not (packed / "MLmodel").is_file():
        return None
    flavor = import_mlflow("mlflow.models").Model.load(str(packed)).flavors["python_function"]
    folder = packed / flavor["artifacts"][_ARTIFACT]["path"]
    return folder if folder.is_dir() else None
