"""What a job that trains an adapter leaves beside its model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from fewstep.kernels.model.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from fewstep.kernels.model.lora_settings import LoraSettings
from fewstep.pipelines.pretrain_start import Start
from fewstep.platform.artifacts import atomic_folder
from fewstep.platform.tracking import Tracker

ADAPTER = "adapter"
"""Folder of a run, beside `model`."""


class TrainsAdapter(Protocol):
    """What is asked of a trainer here (actors/trainer.py)."""

    def adapter(self) -> dict[str, torch.Tensor]: ...


class AdapterKeeper:
    """Writes the adapter that a trainer holds now, if it trains one.

    Args:
        settings: None = it does not, and nothing is written.
        start: the model under the adapter.
    """

    def __init__(self, trainer: TrainsAdapter, settings: LoraSettings | None, start: Start) -> None:
        self._trainer, self._settings, self._start = trainer, settings, start

    def __call__(self, folder: Path) -> None:
        """Write `folder`, in PEFT's format; what an earlier job left there is gone either way.

        Raises:
            CheckpointError, ResourceError: it cannot be written.
        """
        if self._settings is None:
            shutil.rmtree(folder, ignore_errors=True)
            return
        start = self._start
        save_adapter(
            folder, self._trainer.adapter(), self._settings, start.model, start.address, start.digest
        )

    def log(self, tracker: Tracker, folder: Path) -> None:
        """Keep what was written with the run."""
        if self._settings is not None:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                tracker.log_artifact(folder / name, ADAPTER)
            print(f"wrote {folder}", flush=True)


def copy_adapter(source: Path, target: Path) -> None:
    """A copy of an adapter folder, whole or not at all."""
    with atomic_folder(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def adapter_tags(settings: LoraSettings | None) -> Mapping[str, str]:
    """What a run's page says of the adapter; the model under it is `model.source` and `model.source_digest`."""
    if settings is None:
        return {}
    return {
        "adapter.kind": "lora",
        "adapter.rank": str(settings.rank),
        "adapter.alpha": f"{settings.alpha:g}",
        "adapter.target_modules": ", ".join(settings.target_modules),
    }
