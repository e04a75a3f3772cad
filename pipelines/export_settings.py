"""Configuration of `fewstep export`; free of torch and Ray, so that the command line reads it at once."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fewstep.platform.config import Config


class ExportConfig(Config):
    """A trained model as a folder in Hugging Face layout, with a card that says how it came to be."""

    path: str = Field(min_length=1)
    """Run folder of a job, or a model folder, or models:/NAME@ALIAS."""
    adapter: str = ""
    """Folder of a LoRA adapter in PEFT's format, or of the run that trained it, to merge into the model at `path`."""
    out: Path = Path("export")
    """Folder to write; an older one of that name is replaced."""
    name: str = ""
    """Title of the card; empty = the folder's name."""
    license: str = ""
    """Licence identifier of the card's header, such as apache-2.0; empty = none is stated."""
    tracking_uri: str = ""
    """MLflow store of a models:/ address; empty = MLFLOW_TRACKING_URI, else the project's."""
