"""The Serve application of a RayService: what `fewstep serve` starts, from the same configuration."""

from __future__ import annotations

from typing import Any

from fewstep.actors.serving.replica import application
from fewstep.cluster.deploy import ServeConfig, served_name, serving_options
from fewstep.pipelines.models import model_folder


def build(args: dict[str, Any]) -> Any:
    """Serve's application builder; `args` is a `ServeConfig` as data.

    Raises:
        UserError: the model is not there.
    """
    config = ServeConfig.model_validate(args)
    folder = model_folder(config.model, config.tracking_uri).resolve()
    return application(folder, config.name or served_name(config.model, folder), **serving_options(config))
