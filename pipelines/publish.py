"""From a model folder to the registry: what every job that ends with a model calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
) -> str:
    """Registers a model folder as a callable pyfunc and moves an alias to it.

    Args:
        tracker: the run that made the model.
        folder: config.json, model.safetensors, tokenizer.json.
        name, alias: it will be `models:/name@alias`.
        metrics: shown on the model's page, such as `eval/heldout/pass_at_1`.
        input_example: one prompt.
        policy: the decode policy the model answers with unless a call says otherwise.
        step: training step of the weights.
        dataset: name of a data set the tracker knows that `metrics` were measured on; "" = none.
    Returns:
        What `fewstep serve --model` takes: `models:/name@alias`, or the folder when the tracker has no registry.
    Raises:
        ConfigError: a name or alias the registry cannot hold.
        CheckpointError: the folder is missing or its config.json is not a model's.
        ResourceError: the store failed.
    """
    context = ModelConfig.load(folder).max_position_embeddings
    return tracker.register_model(
        TrackedModel(
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
        )
    )
