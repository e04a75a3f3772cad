"""When `fewstep serve` starts and ends replicas by itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fewstep.platform.config import Config

Routing = Literal["requests", "load", "prefix"]


class ScalingConfig(Config):
    """Between how many replicas, and by what. On where `max_replicas` is above `min_replicas`."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    backlog_s: float = Field(default=0.5, gt=0.0)
    """Seconds of work, at a full batch, that a replica should have before it: masks left / (tokens per forward x slots) x
    seconds of a forward. More is shared out among more replicas."""
    up_delay_s: float = Field(default=2.0, ge=0.0)
    """How long more replicas must have been wanted before they are started."""
    down_delay_s: float = Field(default=60.0, ge=0.0)
    """How long fewer must have been wanted before one is ended; its requests may finish."""
    interval_s: float = Field(default=1.0, gt=0.0)
    """Between two reports of a replica, to the autoscaler and to the router."""

    @model_validator(mode="after")
    def _in_order(self) -> ScalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        if self.max_replicas == self.min_replicas > 1:
            raise ValueError("max_replicas must be above min_replicas; for a fixed number set num_replicas")
        return self

    @property
    def on(self) -> bool:
        return self.max_replicas > self.min_replicas
