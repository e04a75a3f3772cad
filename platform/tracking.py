"""What a run leaves behind: the protocol every job writes to, and the tracker that keeps it in memory.

A run has exactly one writer, the driver. Workers return their numbers with their results; a second process that
opened the same run would race on its status and on a sqlite store's locks. `MlflowTracker` (mlflow_tracker.py) is
the tracker of real runs; `MemoryTracker` serves tests, and measures what the other one costs.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from fewstep.platform.errors import ConfigError
from fewstep.platform.records import DecodePolicy
from fewstep.platform.rollout_trace import RolloutTrace

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
DatasetContext = Literal["training", "evaluation"]

_ILLEGAL_IN_METRIC = re.compile(r"[^\w\-. /:]")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")
_NAME = re.compile(r"[^/:]+")
_ALIAS = re.compile(r"[A-Za-z][\w-]*")
_VERSION_LIKE = re.compile(r"[vV]\d+")


@dataclass(frozen=True)
class TrackedModel:
    """A model folder on its way into the registry, or a checkpoint on the way to it.

    Attributes:
        folder: config.json, safetensors, tokenizer.json.
        name: registered name; not empty, without `/` and `:`.
        alias: what serving will ask for, such as `champion`; moves here from any older version. Empty = a checkpoint,
            which is logged and not registered.
        metrics: numbers shown on the model's own page.
        input_example: one prompt; shown in the registry as the way to call it.
        code: the models-from-code script that answers for the folder.
        policy: decode policy it answers with unless told otherwise.
        max_tokens: completion budget it answers with unless told otherwise.
        step: training step of the weights.
        dataset: name of a data set given to `log_dataset` that `metrics` were measured on; "" = none.
        facts: more about the model as JSON, kept in its MLmodel file, such as its frontier.
        requirements: the installed distributions the script needs, pinned at registration.

    Raises:
        ConfigError: a name or an alias the registry cannot hold.
    """

    folder: Path
    name: str
    alias: str
    metrics: Mapping[str, float]
    input_example: str
    code: Path
    policy: DecodePolicy
    max_tokens: int
    step: int = 0
    dataset: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    requirements: tuple[str, ...] = (
        "fewstep",
        "mlflow",
        "numpy",
        "pandas",
        "safetensors",
        "tokenizers",
        "torch",
    )

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                "model name", repr(self.name), "a non-empty name without / and :", "choose another name"
            )
        if self.alias and (
            not _ALIAS.fullmatch(self.alias)
            or _VERSION_LIKE.fullmatch(self.alias)
            or self.alias.lower() == "latest"
        ):
            raise ConfigError(
                "model alias", repr(self.alias), "letters, digits, _ and -; not `latest`, not like `v1`",
                "choose another alias, such as champion",
            )  # fmt: skip

    @property
    def uri(self) -> str:
        """`models:/NAME@ALIAS`; a checkpoint has no such address."""
        return f"models:/{self.name}@{self.alias}"


class Tracker(Protocol):
    """Where a run's parameters, metrics, data sets, figures, files and models go.

    Metric groups are `reward/* rollout/* train/* sync/* perf/* eval/<set>/*`; `step` is the global step of the
    run. Used as a context manager, a tracker gives its run the true status: FINISHED, KILLED on Ctrl-C or a
    terminating signal turned SystemExit, FAILED on any other exception, which goes on to the caller.
    """

    @property
    def run_id(self) -> str: ...

    @property
    def resumed(self) -> bool:
        """Whether this is a run of an earlier process that is gone on with."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested mappings become dotted keys. A key can be given once per run; in a run that is gone on with, keys
        that it has already keep their first value."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Never waits for the store; NaN is kept. Points that a run gone on with has already are left out."""

    def log_dataset(
        self,
        name: str,
        *,
        digest: str,
        context: DatasetContext,
        source: str,
        profile: Mapping[str, int] | None = None,
    ) -> None:
        """Lineage. `digest` identifies the content, `source` is a path or a sentence on how it is made, `profile`
        holds counts such as `num_tasks`."""

    def log_figure(self, name: str, path: Path, step: int = 0) -> None:
        """A PNG. The same `name` at several steps is one figure with a slider."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder, copied under `folder` of the run's artifacts. It may be replaced afterwards, but not
        written into."""

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table shown on the run's page; a later one of the same name takes its place."""

    def log_trace(self, trace: RolloutTrace) -> None:
        """One sampled answer, stage by stage."""

    def log_checkpoint(self, model: TrackedModel) -> None:
        """A logged model with its metrics; its weights are pointed to, not copied."""

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def register_model(self, model: TrackedModel) -> str:
        """Copies the folder into the registry and moves the alias to it; returns what `fewstep serve --model` takes:
        the address, or the folder itself where the registry cannot be reached."""

    def finish(self, status: RunStatus) -> None:
        """Writes what is queued and closes the run; a second call does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass
class MemoryTracker:
    """Keeps a run in plain attributes. Nothing reaches a disk, so `register_model` returns the folder itself."""

    run_id: str = "untracked"
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    artifacts: list[tuple[Path, str]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    traces: list[RolloutTrace] = field(default_factory=list)
    checkpoints: list[TrackedModel] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    models: list[TrackedModel] = field(default_factory=list)
    status: RunStatus | Literal["RUNNING"] = "RUNNING"
    resumed: bool = False

    def log_params(self, params: Mapping[str, Any]) -> None:
        flat = flatten_params(params)
        refuse_repeated(flat, self.params)
        self.params.update(flat)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.metrics.setdefault(metric_key(key), []).append((int(step), float(value)))

    def log_dataset(
        self,
        name: str,
        *,
        digest: str,
        context: DatasetContext,
        source: str,
        profile: Mapping[str, int] | None = None,
    ) -> None:
        self.datasets[name] = {
            "digest": digest, "context": context, "source": source, "profile": dict(profile or {})
        }  # fmt: skip

    def log_figure(self, name: str, path: Path, step: int = 0) -> None:
        self.figures.setdefault(name, []).append((step, Path(path)))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self.artifacts.append((Path(path), folder))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.tables[name] = [dict(row) for row in rows]

    def log_trace(self, trace: RolloutTrace) -> None:
        self.traces.append(trace)

    def log_checkpoint(self, model: TrackedModel) -> None:
        self.checkpoints.append(model)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tags.update(tags)

    def register_model(self, model: TrackedModel) -> str:
        self.models.append(model)
        return str(model.folder)

    def finish(self, status: RunStatus) -> None:
        if self.status == "RUNNING":
            self.status = status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(status_of(error))


def status_of(error: BaseException | None) -> RunStatus:
    """The status of a run that ended with `error` (None = its end)."""
    if error is None:
        return "FINISHED"
    if isinstance(error, KeyboardInterrupt):
        return "KILLED"
    if isinstance(error, SystemExit):
        if error.code in (None, 0):
            return "FINISHED"
        # The shell's convention for a process that a signal ended.
        return "KILLED" if error.code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else "FAILED"
    return "FAILED"


def flatten_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys and text values: `{"a": {"b": None}}` becomes `{"a.b": "None"}`.

    Raises:
        ValueError: a value that has no text of its own but a memory address, which no two runs have in common.
    """
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update(flatten_params(value, f"{prefix}{key}."))
            continue
        text = str(value)
        if _ADDRESS.search(text):
            raise ValueError(f"parameter {prefix}{key} is told as {text}; give it a stable text")
        flat[f"{prefix}{key}"] = text
    return flat


def refuse_repeated(flat: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Raises ConfigError when a parameter of the run would change its value."""
    for key, value in flat.items():
        if known.get(key, value) != value:
            raise ConfigError(
                key,
                value,
                f"{known[key]}, which this run has already recorded",
                "log a parameter once per run",
            )


def metric_key(key: str) -> str:
    """A key MLflow accepts: `pass@1` becomes `pass_at_1`, other illegal characters `_`, empty groups vanish."""
    parts = [
        part for part in _ILLEGAL_IN_METRIC.sub("_", key.replace("@", "_at_")).split("/") if part.strip()
    ]
    if not parts:
        raise ValueError(f"metric key {key!r} has no legal character")
    return "/".join(parts)
