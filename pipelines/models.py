"""Which model a job means: a folder, an address in MLflow's registry, or the one shipped with the package."""

from __future__ import annotations

import os
from pathlib import Path

# Where `make demo` keeps its store: a newcomer's models:/ names are looked up there.
DEMO_TRACKING_URI = "sqlite:///runs/demo/mlflow.db"


def model_folder(model: str, tracking_uri: str) -> Path:
    """The local folder of a model.

    Args:
        model: a model folder, `models:/NAME@ALIAS`, or empty for the embedded model.
        tracking_uri: the MLflow store a `models:/` address is looked up in; empty = MLflow's own variable
            MLFLOW_TRACKING_URI, and without that the store of `make demo`.
    Raises:
        UserError: the address does not resolve. A folder is not looked into; loading it does that.
    """
    # Both imports are late: one brings torch, the other MLflow, and a plain folder needs neither.
    if not model:
        from fewstep.kernels.model.checkpoint import embedded_model

        return embedded_model()
    if model.startswith("models:/"):
        from fewstep.platform.mlflow_registry import mlflow_model_folder

        store = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "") or DEMO_TRACKING_URI
        return mlflow_model_folder(model, store)
    return Path(model)
