"""Keys, statuses and the tracker that keeps a run in memory."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fewstep.platform.errors import ConfigError
from fewstep.platform.records import DecodePolicy
from fewstep.platform.tracking import (
    MemoryTracker,
    TrackedModel,
    Tracker,
    flatten_params,
    metric_key,
    status_of,
)


def tracked_model(name: str = "tiny", alias: str = "champion") -> TrackedModel:
    return TrackedModel(
        folder=Path("model"), name=name, alias=alias, metrics={}, input_example="def f(", code=Path("pyfunc.py"),
        policy=DecodePolicy(), max_tokens=64,
    )  # fmt: skip


def test_nested_params_become_dotted_text() -> None:
    nested = {"seed": 1, "train": {"lr": 1e-4, "group": {"size": 8}}, "resume": None}
    assert flatten_params(nested) == {
        "seed": "1",
        "train.lr": "0.0001",
        "train.group.size": "8",
        "resume": "None",
    }


def test_a_parameter_whose_text_is_a_memory_address_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"parameter train\.hook is told as <object object at 0x"):
        flatten_params({"train": {"hook": object()}})


@pytest.mark.parametrize(
    ("key", "legal"),
    [
        ("reward/mean", "reward/mean"),
        ("eval/held-out/pass@1", "eval/held-out/pass_at_1"),
        ("//train///loss/", "train/loss"),
        ("sync/µs (p50)", "sync/µs _p50_"),
    ],
)
def test_metric_keys_become_legal(key: str, legal: str) -> None:
    assert metric_key(key) == legal


def test_a_metric_key_of_slashes_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no legal character"):
        metric_key("//")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(), "FINISHED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(128 + signal.SIGTERM), "KILLED"),
        (SystemExit(2), "FAILED"),
        (SystemExit("no such file"), "FAILED"),
        (RuntimeError("loss is NaN"), "FAILED"),
    ],
)
def test_a_run_ends_with_the_status_of_its_error(error: BaseException | None, status: str) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize("name", ["", "a/b", "a:b"])
def test_a_name_the_registry_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="model name"):
        tracked_model(name=name)


@pytest.mark.parametrize("alias", ["latest", "v3", "a b", "1st"])
def test_an_alias_the_registry_cannot_hold_is_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match="model alias"):
        tracked_model(alias=alias)


def test_memory_keeps_what_a_job_logs() -> None:
    tracker = MemoryTracker()
    job: Tracker = tracker
    with job:
        job.log_params({"seed": 1})
        job.log_metrics({"reward/mean": 0.5}, step=0)
        job.log_metrics({"reward/mean": 0.75}, step=1)
        job.log_dataset(
            "train", digest="ab", context="training", source="generated", profile={"num_tasks": 3}
        )
        job.log_figure("frontier", Path("frontier.png"), step=1)
        job.log_artifact(Path("config.yaml"), "config")
        job.set_tags({"story": "demo"})
        job.log_table("samples", [{"step": 1}])
        job.log_checkpoint(tracked_model(alias=""))
        assert job.register_model(tracked_model()) == "model"
        assert tracker.status == "RUNNING"
    assert tracker.status == "FINISHED"
    assert tracker.params == {"seed": "1"}
    assert tracker.metrics == {"reward/mean": [(0, 0.5), (1, 0.75)]}
    assert tracker.datasets["train"]["profile"] == {"num_tasks": 3}
    assert tracker.figures == {"frontier": [(1, Path("frontier.png"))]}
    assert tracker.artifacts == [(Path("config.yaml"), "config")]
    assert tracker.tags == {"story": "demo"}
    assert tracker.tables == {"samples": [{"step": 1}]}
    assert [model.alias for model in tracker.checkpoints] == [""]
    assert [model.uri for model in tracker.models] == ["models:/tiny@champion"]


def test_memory_refuses_a_changed_param() -> None:
    tracker = MemoryTracker()
    tracker.log_params({"train": {"lr": 1}})
    tracker.log_params({"train": {"lr": 1}})
    with pytest.raises(ConfigError, match=r"train\.lr"):
        tracker.log_params({"train": {"lr": 2}})
