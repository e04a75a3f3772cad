"""From a model folder to the registry: what every job calls that makes a model or passes a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.records import DecodePolicy
from fewstep.platform.tracking import TrackedModel, Tracker

# Read by MLflow, not imported here: executing it declares the model of the executing process.
PYFUNC_SCRIPT = Path(__file__).with_name("pyfunc.py")

_DEFAULT_MAX_TOKENS = 256


def publish_model(
    tracker: Tracker,
    folder: Path,
    *,
    name: str,
    alias: str,
    metrics: Mapping[str, float],
    input_example: str,
    policy: DecodePolicy,
    step: int = 0,
    dataset: str = "",
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Registers a model folder as a callable pyfunc and moves an alias to it.

    Args:
        tracker: the run that made the model.
        folder: config.json, safetensors, tokenizer.json.
        name, alias: it will be `models:/name@alias`.
        metrics: shown on the model's page, such as `eval/heldout/pass_at_1`.
        input_example: one prompt.
        policy: the decode policy the model answers with unless a call says otherwise.
        step: training step of the weights.
        dataset: name of a data set the tracker knows that `metrics` were measured on; "" = none.
        facts: more about the model, kept in its MLmodel file.
    Returns:
        What `fewstep serve --model` takes: `models:/name@alias`, or the folder when the tracker has no registry or
        cannot reach it.
    Raises:
        ConfigError: a name or alias the registry cannot hold.
        CheckpointError: the folder is missing or its config.json is not a model's.
        ResourceError: the store failed.
    """
    return tracker.register_model(
        _model(folder, name, alias, metrics, input_example, policy, step, dataset, facts or {})
    )


def log_checkpoint(
    tracker: Tracker,
    folder: Path,
    *,
    name: str,
    metrics: Mapping[str, float],
    input_example: str,
    policy: DecodePolicy,
    step: int,
) -> None:
    """Logs a model folder as a checkpoint of the run: callable like a registered model, its weights where they are.

    Args:
        tracker: the run.
        folder: config.json, safetensors, tokenizer.json; the checkpoint lives as long as this folder.
        name: what the logged model is called; one name for all checkpoints of a run.
        metrics: linked to the logged model at `step`.
        input_example, policy, step: as `publish_model` takes them.
    Raises:
        CheckpointError: the folder is missing or its config.json is not a model's.
    """
    tracker.log_checkpoint(_model(folder, name, "", metrics, input_example, policy, step, "", {}))


def _model(
    folder: Path,
    name: str,
    alias: str,
    metrics: Mapping[str, float],
    input_example: str,
    policy: DecodePolicy,
    step: int,
    dataset: str,
    facts: Mapping[str, Any],
) -> TrackedModel:
    context = ModelConfig.load(folder).max_position_embeddings
    return TrackedModel(
        folder=folder,
        name=name,
        alias=alias,
        metrics=metrics,
        input_example=input_example,
        code=PYFUNC_SCRIPT,
        policy=policy,
        # Leaves half of the context to the prompt.
        max_tokens=min(_DEFAULT_MAX_TOKENS, context // 2),
        step=step,
        dataset=dataset,
        facts=facts,
    )
