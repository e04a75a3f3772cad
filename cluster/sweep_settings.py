"""Configuration of `fewstep sweep`, and the trials it means; free of torch, Ray and MLflow."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from fewstep.platform.config import Config, load_config
from fewstep.platform.errors import ConfigError
from fewstep.platform.rng import generator

# The job's configuration class, and what is best by default: a dotted key of its result.
JOBS = {
    "refine": ("fewstep.pipelines.settings:RefineConfig", "speedup_forwards", True),
    "pretrain": ("fewstep.pipelines.settings:PretrainConfig", "nll_per_token", False),
}
_OWN_KEYS = ("out", "resume", "tracking_uri", "experiment", "require_tracking")


class Range(Config):
    """Where a key's values are drawn from."""

    low: float
    high: float
    log: bool = False
    """Draw the logarithm evenly; for rates and weights."""
    integer: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high or (self.log and self.low <= 0.0):
            raise ValueError("low must be below high, and above 0 where log is true")
        return self

    def draw(self, number: int, key: str, seed: int) -> float | int:
        """The value of draw `number`; a function of (seed, key, number) only."""
        share = float(generator("sweep", seed, key, number).random())
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.integer else float(f"{value:.4g}")


class SweepConfig(Config):
    """One job over a grid or random draws of its keys; each trial is a run nested under the sweep's."""

    command: Literal["refine", "pretrain"] = "refine"
    """The job."""
    out: Path = Path("runs/sweep")
    """The sweep's folder; each trial has its own below it."""
    base: dict[str, Any] = Field(default_factory=dict)
    """The job's keys that are the same in every trial, as in its own YAML file."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Dotted keys and the values of each: every combination is tried."""
    random: dict[str, Range] = Field(default_factory=dict)
    """Dotted keys and the range each is drawn from; with a grid, `num_draws` times at each of its points."""
    num_draws: int = Field(default=8, ge=1)
    """Draws of `random`."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    concurrent: int = Field(default=1, ge=1)
    """Trials at once; the cluster needs room for all of them."""
    goal: str = ""
    """Dotted key of a trial's report that says which is best; empty = speedup_forwards or nll_per_token."""
    maximize: bool | None = None
    """Whether more of `goal` is better; null = as the job's own goal has it."""
    resume: bool = True
    """Go on with the sweep in `out`: finished trials stay, others go on from their checkpoints."""
    tracking_uri: str | None = None
    """MLflow store; null = MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    experiment: str = "fewstep"
    """MLflow experiment; made when missing."""

    @model_validator(mode="after")
    def _has_something_to_try(self) -> SweepConfig:
        if not self.grid and not self.random:
            raise ValueError("grid or random must name at least one key")
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"grid has no values for {', '.join(empty)}")
        for key in {*self.base, *self.grid, *self.random}:
            if key in _OWN_KEYS:
                raise ValueError(f"{key} is set by the sweep for every trial; set the sweep's own {key}")
        if both := sorted(self.grid.keys() & self.random.keys()):
            raise ValueError(f"{', '.join(both)} cannot be both in grid and in random")
        return self

    @property
    def best_by(self) -> tuple[str, bool]:
        """The goal, and whether more of it is better."""
        _, goal, more = JOBS[self.command]
        return self.goal or goal, more if self.maximize is None else self.maximize


@dataclass(frozen=True)
class Trial:
    """One configuration to try.

    Attributes:
        number: from 0.
        values: the swept keys.
        name: number and values, fit for a folder.
        config: the job's configuration.
    """

    number: int
    values: dict[str, Any]
    name: str
    config: Config


def trials_of(config: SweepConfig) -> list[Trial]:
    """Every trial with its validated configuration, in order.

    Raises:
        ConfigError: a key or a value that the job refuses.
    """
    module, _, attribute = JOBS[config.command][0].partition(":")
    job: type[Config] = getattr(importlib.import_module(module), attribute)
    trials = []
    with tempfile.TemporaryDirectory(prefix="fewstep-sweep-") as scratch:
        base = Path(scratch) / "base.yaml"
        base.write_text(yaml.safe_dump(config.base))
        for number, values in enumerate(_points(config)):
            name = _name(number, values)
            own = {
                **values, "out": str(config.out.resolve() / "trials" / name), "resume": config.resume,
                "tracking_uri": config.tracking_uri, "experiment": config.experiment,
            }  # fmt: skip
            overrides = [f"{key}={json.dumps(value)}" for key, value in own.items()]
            try:
                trials.append(Trial(number, values, name, load_config(job, base, overrides)))
            except ConfigError as error:
                raise ConfigError(
                    f"trial {number}, {error.field}", error.got, error.allowed, error.fix
                ) from error
    return trials


def _points(config: SweepConfig) -> Iterator[dict[str, Any]]:
    drawn = 0
    for combination in itertools.product(*config.grid.values()):
        point = dict(zip(config.grid, combination, strict=True))
        for _ in range(config.num_draws if config.random else 1):
            yield point | {key: own.draw(drawn, key, config.seed) for key, own in config.random.items()}
            drawn += 1


def _name(number: int, values: dict[str, Any]) -> str:
    words = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
    return f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', words)}"[:72].rstrip("-_.")
