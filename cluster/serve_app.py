"""The Serve application of a RayService: what `fewstep serve` starts, from the same configuration."""

from __future__ import annotations

from typing import Any

from fewstep.actors.serving.replica import application
from fewstep.cluster.deploy import ServeConfig, serving_options
from fewstep.cluster.served_models import model_sources


def build(args: dict[str, Any]) -> Any:
    """Serve's application builder; `args` is a `ServeConfig` as data.

    Raises:
        UserError: the model is not there.
    """
    config = ServeConfig.model_validate(args)
    sources = model_sources(config.model, config.name, config.tracking_uri)
    return application(sources, **serving_options(config))
