"""How a model came to be: the stages it went through, newest first, read from the folders of the jobs that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fewstep.pipelines.corpus import MANIFEST
from fewstep.pipelines.run_record import RunRecord, folder_record
from fewstep.pipelines.tracked_run import CONFIG_FILE
from fewstep.platform.config import read_mapping

CONVERSION, MODEL = "conversion.json", "model"
Kind = Literal["pretrain", "distill", "refine", "convert"]
# A key of its configuration that no other job has.
_TELLING: dict[str, Kind] = {"phases": "pretrain", "pool": "distill", "objective": "refine"}


@dataclass(frozen=True)
class Stage:
    """One job.

    Attributes:
        kind: what it did; folder: where its files are.
        source: the model it began with; "" = fresh weights.
        config: its configuration; empty of a conversion.
        conversion: what a conversion wrote down.
        corpus: corpus.json of its data; empty where it trained on the embedded family or the corpus is gone.
        record: its report and history.
    """

    kind: Kind
    folder: Path
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)
    conversion: Mapping[str, Any] = field(default_factory=dict)
    corpus: Mapping[str, Any] = field(default_factory=dict)
    record: RunRecord | None = None

    def last_metrics(self) -> Mapping[str, Any]:
        """The last row of a pre-training's metrics; empty where there is none."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return json.loads(lines[-1]) if lines else {}


def stages_of(model: Path) -> list[Stage]:
    """The stages of a model folder as far as the folders of earlier ones are still there."""
    stages: list[Stage] = []
    seen: set[Path] = set()
    folder: Path | None = model
    while folder is not None and folder.resolve() not in seen:
        seen.add(folder.resolve())
        stage = _stage(folder, converted=any(found.kind == "convert" for found in stages))
        if stage is None:
            break
        stages.append(stage)
        folder = Path(stage.source) if stage.source and Path(stage.source).is_dir() else None
    return stages


def _stage(model: Path, converted: bool) -> Stage | None:
    run = model.parent
    if model.name == MODEL and (run / CONFIG_FILE).is_file():
        values = read_mapping(run / CONFIG_FILE)
        kind = next((kind for key, kind in _TELLING.items() if key in values), None)
        if kind is None:
            return None
        corpus = Path(str(values.get("data") or "")) / MANIFEST
        return Stage(
            kind, run, str(values.get("model") or ""), values,
            corpus=json.loads(corpus.read_text()) if corpus.is_file() else {}, record=folder_record(run),
        )  # fmt: skip
    # The record travels with the other files of a model, so only the first one met is a conversion of its own.
    if (model / CONVERSION).is_file() and not converted:
        conversion = json.loads((model / CONVERSION).read_text())
        return Stage("convert", model, str(conversion["source"]), conversion=conversion)
    return None
