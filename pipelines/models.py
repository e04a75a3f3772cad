"""Which model a job means: a folder, an address in MLflow's registry, or the one shipped with the package."""

from __future__ import annotations

from pathlib import Path


def model_folder(model: str, tracking_uri: str) -> Path:
    """The local folder of a model.

    Args:
        model: a model folder, `models:/NAME@ALIAS`, or empty for the embedded model.
        tracking_uri: the MLflow store a `models:/` address is looked up in; empty = MLflow's own variable
            MLFLOW_TRACKING_URI, and without that the project's store, runs/mlflow.db.
    Raises:
        UserError: the address does not resolve. A folder is not looked into; loading it does that.
    """
    # Both imports are late: one brings torch, the other MLflow, and a plain folder needs neither.
    if not model:
        from fewstep.kernels.model.checkpoint import embedded_model

        return embedded_model()
    if model.startswith("models:/"):
        from fewstep.platform.mlflow_registry import mlflow_model_folder
        from fewstep.platform.mlflow_store import project_uri

        return mlflow_model_folder(model, project_uri(tracking_uri))
    return Path(model)


def pinned_model(model: str, tracking_uri: str) -> tuple[str, Path]:
    """A model's address as it stands now, with a version in place of an alias, and its local folder.

    Raises:
        UserError: as `model_folder`.
    """
    if not model.startswith("models:/"):
        return model or "embedded", model_folder(model, tracking_uri)
    from fewstep.platform.mlflow_registry import find_model
    from fewstep.platform.mlflow_store import project_uri

    found = find_model(model, project_uri(tracking_uri))
    return found.address, found.folder
