"""Configuration of the commands that read runs back; free of torch, Ray and MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fewstep.platform.config import Config

Accepted = Literal["nothing", "quality", "speed", "both"]


class RunsConfig(Config):
    """List the runs of a store."""

    tracking_uri: str = ""
    """MLflow store; empty = MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    experiment: str = ""
    """Only the runs of this experiment; empty = of all."""
    limit: int = Field(default=20, ge=1)
    """How many, the newest first."""


class CompareConfig(Config):
    """Two runs beside each other: what differed, what came out, what it cost."""

    first: str = Field(min_length=1)
    """A run: the folder of a job, a run id or its beginning, a name, or a model it made (models:/NAME@ALIAS)."""
    second: str = Field(min_length=1)
    """Another run."""
    tracking_uri: str = ""
    """MLflow store; empty = MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    out: Path = Path("runs/compare.png")
    """The figure."""


class ReportConfig(Config):
    """One run as a page: HTML without a network, and Markdown."""

    run: str = Field(min_length=1)
    """The folder of a job, a run id or its beginning, a name, or a model it made (models:/NAME@ALIAS)."""
    tracking_uri: str = ""
    """MLflow store; empty = MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    out: Path | None = None
    """Folder for report.html and report.md; null = the job's own folder, or runs/reports/RUN."""
    examples: int = Field(default=2, ge=0)
    """Answers shown of each outcome class."""


class PromoteConfig(Config):
    """Make a registered version the one that is served."""

    name: str = "fewstep-tiny"
    """Name in the model registry."""
    candidate: str = "candidate"
    """Alias or number of the version to promote."""
    accept: Accepted = "nothing"
    """What the candidate may give up against the champion: quality, speed or both."""
    tracking_uri: str = ""
    """MLflow store; empty = MLFLOW_TRACKING_URI, else runs/mlflow.db."""
