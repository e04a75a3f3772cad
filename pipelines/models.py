"""Which model, or which adapter, a job means: a folder, an address in MLflow's registry, or the one shipped with the package."""

from __future__ import annotations

from pathlib import Path


def model_folder(model: str, tracking_uri: str) -> Path:
    """The local folder of a model, as `pinned_model` finds it."""
    return pinned_model(model, tracking_uri)[1]


def pinned_model(model: str, tracking_uri: str) -> tuple[str, Path]:
    """A model's address as it stands now, with a version in place of an alias, and its local folder.

    Args:
        model: a model folder, `models:/NAME@ALIAS`, or empty for the embedded model.
        tracking_uri: the MLflow store a `models:/` address is looked up in; empty = MLflow's own variable
            MLFLOW_TRACKING_URI, and without that the project's store, runs/mlflow.db.
    Raises:
        UserError: the address does not resolve. A folder is not looked into; loading it does that.
    """
    # The imports are late: one brings torch, the others MLflow, and a plain folder needs neither.
    if model.startswith("models:/"):
        from fewstep.platform.mlflow_registry import find_model
        from fewstep.platform.mlflow_store import project_uri

        found = find_model(model, project_uri(tracking_uri))
        return found.address, found.folder
    if model:
        return model, Path(model)
    from fewstep.kernels.model.checkpoint import embedded_model

    return "embedded", embedded_model()


def adapter_folder(adapter: str) -> Path:
    """The folder of an adapter: as given, or `adapter` in the folder of the run that trained it. It is not looked into."""
    folder = Path(adapter)
    inner = folder / "adapter"
    return inner if inner.is_dir() and not (folder / "adapter_config.json").is_file() else folder
