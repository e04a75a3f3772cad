"""The Serve application of a RayService: what `fewstep serve` starts, from the same configuration."""

from __future__ import annotations

from typing import Any

from fewstep.actors.serving.replica import application
from fewstep.cluster.deploy import ServeConfig, checked_sources, serving_options


def build(args: dict[str, Any]) -> Any:
    """Serve's application builder; `args` is a `ServeConfig` as data.

    Raises:
        UserError: as `checked_sources`.
    """
    config = ServeConfig.model_validate(args)
    # Serve's proxies listen on every address of a pod.
    return application(checked_sources(config, "0.0.0.0"), **serving_options(config))
