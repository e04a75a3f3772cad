"""The three ways to name a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.kernels.model.checkpoint import MODEL_FILES
from fewstep.pipelines.models import model_folder
from fewstep.platform.errors import ConfigError


def test_nothing_means_the_model_shipped_with_the_package() -> None:
    folder = model_folder("", "")
    assert [name for name in MODEL_FILES if not (folder / name).is_file()] == []


def test_a_path_is_taken_as_it_is() -> None:
    assert model_folder("runs/demo/model", "") == Path("runs/demo/model")


def test_an_address_is_looked_up_in_the_store_named_else_mlflows_else_the_projects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///variable.db")
    with pytest.raises(ConfigError, match=rf"sqlite:///{tmp_path}/named\.db"):
        model_folder("models:/fewstep-tiny@champion", "sqlite:///named.db")
    with pytest.raises(ConfigError, match=rf"sqlite:///{tmp_path}/variable\.db"):
        model_folder("models:/fewstep-tiny@champion", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match=rf"sqlite:///{tmp_path}/runs/mlflow\.db"):
        model_folder("models:/fewstep-tiny@champion", "")
