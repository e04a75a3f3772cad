"""A model folder becomes a logged model, a registered version with an alias, or a checkpoint that is only pointed to."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fewstep.platform.artifacts import weights_digest
from fewstep.platform.mlflow_store import import_mlflow, source_tags
from fewstep.platform.records import DecodePolicy
from fewstep.platform.tracking import TrackedModel

ARTIFACT, WEIGHTS, DIGEST = "model", "weights", "weights_sha256"
MARK_TAG = "fewstep.mark"


def model_payload(model: TrackedModel) -> dict[str, Any]:
    """The model as JSON, without its folder."""
    return {
        "name": model.name,
        "alias": model.alias,
        "metrics": dict(model.metrics),
        "input_example": model.input_example,
        "code": str(model.code),
        "policy": model.policy.model_dump(mode="json"),
        "max_tokens": model.max_tokens,
        "step": model.step,
        "dataset": model.dataset,
        "facts": dict(model.facts),
        "requirements": list(model.requirements),
    }


def tracked_model(payload: Mapping[str, Any], folder: Path) -> TrackedModel:
    """What `model_payload` was made from, with its files in `folder`."""
    own = dict(payload)
    own["policy"] = DecodePolicy.model_validate(own["policy"])
    own["code"], own["requirements"] = Path(own["code"]), tuple(own["requirements"])
    return TrackedModel(folder=folder, **own)


def log_by_reference(
    client: Any,
    experiment_id: str,
    run_id: str,
    model: TrackedModel,
    *,
    mark: str,
    dataset_digest: str,
    checksum: str,
) -> str:
    """A logged model whose weights stay where they are: code, signature and settings are kept, and the path.

    Args:
        mark: tells a repetition; the same mark is the same logged model.
        checksum: `weights_digest` of the folder; whoever loads the model checks it, since a path is no promise.
    Returns:
        The logged model's id.
    """
    logged = _logged_model(client, experiment_id, run_id, model, mark)
    if str(logged.status) != "READY":
        _upload(client, logged, run_id, model, checksum)
    _link(client, run_id, logged.model_id, model, dataset_digest)
    return str(logged.model_id)


def register(
    client: Any, experiment_id: str, run_id: str, model: TrackedModel, *, mark: str, dataset_digest: str
) -> str:
    """A logged model with its own copy of the weights, and a registered version that the alias moves to.

    Returns:
        The version's number.
    """
    logged = _logged_model(client, experiment_id, run_id, model, mark)
    if str(logged.status) != "READY":
        _upload(client, logged, run_id, model, None)
    _link(client, run_id, logged.model_id, model, dataset_digest)
    return _publish(client, run_id, logged, model)


def call_defaults(model: TrackedModel) -> dict[str, Any]:
    """What `predict(prompts, params=...)` accepts, with the value each has when it is not given."""
    number = "threshold" if model.policy.kind == "threshold" else "tokens_per_step"
    return {
        "max_tokens": model.max_tokens,
        number: getattr(model.policy, number),
        "temperature": model.policy.temperature,
        "seed": model.policy.seed,
    }


def _logged_model(client: Any, experiment_id: str, run_id: str, model: TrackedModel, mark: str) -> Any:
    """The logged model of this mark; begun when there is none."""
    found = client.search_logged_models([experiment_id], filter_string=f"tags.`{MARK_TAG}` = '{mark}'")
    for logged in found:
        if str(logged.status) != "FAILED":
            return logged
    params = {"step": str(model.step), "max_tokens": str(model.max_tokens)}
    params |= {f"policy.{key}": str(value) for key, value in model.policy.model_dump().items()}
    tags = {"mlflow.note.content": _description(model), MARK_TAG: mark, **source_tags()}
    return client.create_logged_model(
        experiment_id,
        name=model.name,
        source_run_id=run_id,
        model_type="diffusion-lm",
        params=params,
        tags=tags,
    )


def _upload(client: Any, logged: Any, run_id: str, model: TrackedModel, checksum: str | None) -> None:
    """Packs the MLflow model (code, settings, signature, example, pinned requirements) and uploads it.

    Args:
        checksum: of weights that stay where they are; None = they are uploaded.
    Raises:
        RuntimeError: it cannot be packed; the logged model is then marked FAILED.
    """
    with tempfile.TemporaryDirectory(prefix="fewstep-model-") as scratch:
        packed = Path(scratch) / "packed"
        try:
            _pack(packed, logged, run_id, model, checksum)
        except OSError:
            raise  # of this machine's disk, not of the model
        except Exception as error:
            client.finalize_logged_model(logged.model_id, "FAILED")
            raise RuntimeError(f"{model.name} cannot be packed: {error}") from error
        # A store that fails here is asked again later, for the same logged model.
        client.log_model_artifacts(logged.model_id, str(packed))
    client.finalize_logged_model(logged.model_id, "READY")


def _pack(packed: Path, logged: Any, run_id: str, model: TrackedModel, checksum: str | None) -> None:
    """Without weights first: MLflow would load the model and run the example, in the process that trains."""
    pyfunc, models = import_mlflow("mlflow.pyfunc"), import_mlflow("mlflow.models")
    pyfunc.save_model(
        path=str(packed),
        python_model=str(model.code),
        input_example=([model.input_example], call_defaults(model)),
        model_config={"policy": model.policy.model_dump(mode="json"), "max_tokens": model.max_tokens},
        pip_requirements=[f"{name}=={_public_version(name)}" for name in model.requirements],
        metadata={
            "step": model.step,
            "dataset": model.dataset,
            **model.facts,
            DIGEST: checksum or weights_digest(model.folder),
        },
        mlflow_model=models.Model(
            artifact_path=logged.artifact_location,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
            run_id=run_id,
        ),
    )
    described = models.Model.load(str(packed))
    flavor, source = described.flavors["python_function"], model.folder.resolve()
    if checksum is not None:
        flavor["config"][WEIGHTS] = {"folder": str(source), "sha256": checksum}
    else:
        target = packed / "artifacts" / ARTIFACT
        target.mkdir(parents=True)
        for file in sorted(path for path in source.iterdir() if path.is_file()):
            (target / file.name).symlink_to(file)  # uploading follows it; a copy would be a second one
        flavor["artifacts"] = {ARTIFACT: {"path": f"artifacts/{ARTIFACT}", "uri": source.as_uri()}}
    described.save(str(packed / "MLmodel"))


def _public_version(name: str) -> str:
    # A local part (2.13.0+cpu) names one build for one device; no index offers it under that name.
    return version(name).partition("+")[0]


def _link(client: Any, run_id: str, model_id: str, model: TrackedModel, dataset_digest: str) -> None:
    """Ties the model to its run, and the metrics to the model and the data they were measured on."""
    entities = import_mlflow("mlflow.entities")
    outputs = client.get_run(run_id).outputs
    known = {output.model_id for output in outputs.model_outputs} if outputs is not None else set()
    if model_id not in known:
        client.log_outputs(run_id, [entities.LoggedModelOutput(model_id, step=model.step)])
    # The model's own time, so that a repetition is the same point.
    time_ms = int(client.get_logged_model(model_id).creation_timestamp)
    client.log_batch(
        run_id,
        metrics=[
            entities.Metric(
                key, float(value), time_ms, model.step,
                model_id=model_id, dataset_name=model.dataset or None, dataset_digest=dataset_digest or None,
            )
            for key, value in model.metrics.items()
        ],
    )  # fmt: skip


def _publish(client: Any, run_id: str, logged: Any, model: TrackedModel) -> str:
    exceptions = import_mlflow("mlflow.exceptions")
    try:
        client.create_registered_model(
            model.name, description="Block-diffusion language models made by Fewstep."
        )
    except exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{model.name}' and tags.logged_model = '{logged.model_id}'")
    number = str(known[0].version) if known else _new_version(client, run_id, logged, model)
    # What MLflow's own register_model leaves, so that the logged model's page shows its versions.
    versions = json.dumps([{"name": model.name, "version": int(number)}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": versions})
    client.set_registered_model_alias(model.name, model.alias, number)
    return number


def _new_version(client: Any, run_id: str, logged: Any, model: TrackedModel) -> str:
    scores = {key: f"{value:.6g}" for key, value in model.metrics.items()}
    made = client.create_model_version(
        # Not models:/ID: a database registry would look that id up in the process's global store. A server
        # accepts the location only together with the model it belongs to; neither keeps the id, hence the tag.
        model.name, source=logged.artifact_location, run_id=run_id, model_id=logged.model_id,
        description=_description(model), tags={"logged_model": logged.model_id, "step": str(model.step), **scores},
    )  # fmt: skip
    return str(made.version)


def _description(model: TrackedModel) -> str:
    head = (
        f"Block-diffusion language model after training step {model.step}; "
        f"answers by default with policy {model.policy.label()}, at most {model.max_tokens} tokens.\n"
    )
    if not model.alias:
        return head + "\nA checkpoint: its weights lie in the run's own folder.\n"
    return (
        f"{head}\n    mlflow.pyfunc.load_model({model.uri!r}).predict([prompt])\n\n"
        f"    fewstep serve --model {model.uri}\n"
    )
