"""A refinement without Ray and without training: real answers, real verdicts, a real store, in a few seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.actors.engine.engine import Engine
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.trainer_rank import LogprobSource, Metrics
from fewstep.actors.verifier import LocalVerifier
from fewstep.kernels.model.checkpoint import embedded_model, load_model, save_model
from fewstep.kernels.rows import SampleRows
from fewstep.pipelines.frontier import measure
from fewstep.pipelines.objectives.distill import Distill
from fewstep.pipelines.refine import Progress, Workers, refine
from fewstep.pipelines.refine_job import open_tracker
from fewstep.pipelines.refine_report import RefineResult, conclude
from fewstep.pipelines.settings import RefineConfig, Sweep
from fewstep.pipelines.task_source import open_tasks
from fewstep.platform.records import FrontierPoint, Rollout, WeightVersion
from fewstep.platform.trajectories import write_rollouts


class IdleTrainer:
    """Takes batches and never moves."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def update(self, samples: Sequence[SampleRows], learning_rate: float) -> Metrics:
        return {"loss": 0.5, "targets": float(sum((s.targets >= 0).sum() for s in samples))}

    def logprobs(self, samples: Sequence[SampleRows], source: LogprobSource) -> list[NDArray[np.float32]]:
        raise AssertionError("distillation compares with nothing")

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self._model.state_dict())

    def save(self, folder: Path) -> None:
        raise AssertionError("the loop saves through its checkpoint callback")

    load = save


def small_config(out: Path, uri: str, **changes: object) -> RefineConfig:
    """Two steps, twelve held-out tasks."""
    values: dict[str, object] = {
        "out": out, "tracking_uri": uri, "steps": 2, "prompts_per_step": 4, "group_size": 2, "updates_per_step": 1,
        "trainer": {"num_ranks": 1}, "num_eval_tasks": 12, "traces_per_step": 1.0,
        "sweep": Sweep(thresholds=(0.9, 0.3), tokens_per_step=()),
        **changes,
    }  # fmt: skip
    return RefineConfig.model_validate(values)


def small_run(config: RefineConfig, tags: Mapping[str, str] | None = None) -> RefineResult:
    """The whole of refine_job.py's `run` but pools and training; the model after is the model before."""
    model, tokenizer = load_model(embedded_model())
    engine = Engine(model, tokenizer, max_sequences=16, weight_version=WeightVersion("test", 0, ""))

    def push(state: Mapping[str, torch.Tensor], version: WeightVersion) -> dict[str, float]:
        return {"sync/seconds": 0.01}

    with ExitStack() as stack:
        verifier = stack.enter_context(LocalVerifier())
        source = open_tasks(config, model.config, tokenizer, ChatTemplate(embedded_model()), verifier)
        tracker = stack.enter_context(open_tracker(config, source, resumed=False, tags=tags or {}))
        frontiers: dict[str, list[FrontierPoint]] = {}
        for when in ("before", "after"):

            def keep(point: FrontierPoint, rollouts: list[Rollout], when: str = when) -> None:
                path = config.out / "trajectories" / f"{when}_{point.policy.label()}.parquet"
                write_rollouts(path, rollouts, {"model": when})

            frontiers[when] = measure(
                source.held_out,
                config.sweep.policies(),
                engine.generate,
                verifier.verify,
                tokenizer,
                observe=keep,
            )
        workers = Workers(engine.generate, verifier.verify, IdleTrainer(model), push)
        progress = refine(
            config,
            model.config,
            tokenizer,
            source,
            Distill(),
            workers,
            tracker,
            Progress(),
            lambda progress: None,
        )
        save_model(config.out / "model", model.state_dict(), model.config, tokenizer)
        extra = {
            "data": source.digests,
            "total_seconds": 12.0,
            "refine_seconds": progress.seconds,
            "isolation": verifier.isolation,
        }
        return conclude(
            config, tracker, tokenizer, source, frontiers["before"], frontiers["after"], progress, extra
        )
