"""`fewstep refine`: everything around the on-policy loop.

Measure the frontier, refine, measure again on the same held-out tasks, write the report and the figures, register
the model. The loop itself is in refine.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, Literal

from tokenizers import Tokenizer

from fewstep.actors.node_metrics import OtherNodes
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.verifier import Verifier
from fewstep.kernels.model.checkpoint import load_state, save_model
from fewstep.pipelines.adapters import ADAPTER, AdapterKeeper, adapter_tags, copy_adapter
from fewstep.pipelines.exported_models import ExportedModels
from fewstep.pipelines.frontier import Generate, measure
from fewstep.pipelines.held_out_checks import Standing, best_folder, keep_best
from fewstep.pipelines.objectives import OBJECTIVES
from fewstep.pipelines.objectives.credit import RefineObjective
from fewstep.pipelines.policy_update import Trainer
from fewstep.pipelines.pretrain_start import given_model
from fewstep.pipelines.progress import read_progress, told_how_to_resume, write_progress
from fewstep.pipelines.record_rollouts import record_rollouts
from fewstep.pipelines.refine import BEST, Progress, Workers, refine
from fewstep.pipelines.refine_report import RefineResult, conclude
from fewstep.pipelines.refine_workers import (
    Engines,
    open_engines,
    open_nodes,
    open_trainer,
    open_verifier,
    place_actors,
)
from fewstep.pipelines.retention import open_retention
from fewstep.pipelines.rollouts import check_recorded, rollout_policy
from fewstep.pipelines.settings import FREE_ON_RESUME, RefineConfig
from fewstep.pipelines.task_source import TaskSet, TaskSource, open_tasks, state_digest
from fewstep.pipelines.tracked_run import RunPlan, accelerator, tracked_run
from fewstep.platform.artifacts import atomic_folder, atomic_write_text, file_digest
from fewstep.platform.errors import ConfigError
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import FrontierPoint, Rollout, WeightVersion
from fewstep.platform.registry import resolve
from fewstep.platform.trajectories import write_rollouts

# Weights and data are told by their digests; which node an actor is on, and how weights come there, changes nothing it
# computes.
_TOLD_APART = ("model", "replay", "layout", "weight_transport")


def command(config: RefineConfig) -> None:
    """`fewstep refine`, whole or its rollouts only."""
    if config.rollouts_only:
        record(config)
    else:
        run(config)


def run(config: RefineConfig, tags: Mapping[str, str] | None = None) -> RefineResult:
    """The whole job inside an open Ray session, or without one if it is to run in this process.

    Args:
        tags: more tags of the run; `mlflow.parentRunId` nests it under another.
    Raises:
        UserError: anything that can be refused, before anything is tracked or trained.
    """
    if config.rollouts_only:
        raise ConfigError("rollouts_only", True, "false in a job that trains", "use `fewstep refine`")
    started = time.monotonic()
    with ExitStack() as stack:
        job = _Job(config, stack)
        checkpoint = config.out / "checkpoint"
        saved = read_progress(checkpoint, job.fingerprint, resume=config.resume)
        tracker = job.open_tracker(resumed=saved is not None, tags=dict(tags or {}))
        stack.enter_context(
            told_how_to_resume(checkpoint, config.steps, resume=config.resume, fresh=saved is None)
        )
        engines = stack.enter_context(open_engines(config, job.folder, tracker, job.placement))
        trainer = stack.enter_context(open_trainer(config, job.model, job.folder, job.placement))
        # The replicas hold the starting weights here; a resumed run's are the checkpoint's.
        retention = job.retention and job.retention.answered(
            config, job.tokenizer, engines.generate, job.digest, (saved or {}).get("retained", "")
        )
        frontier = _Frontier(config, job.source, engines.generate, job.verifier, job.tokenizer)
        before = frontier.measure("before")
        keeper = AdapterKeeper(trainer, config.trainer.lora, job.start)
        workers = Workers(engines.generate, job.verifier.verify, trainer, engines.push, keeper)
        progress = _starting_point(config, saved, trainer, tracker)
        progress.retained = retention.answers if retention else ""
        workers.push(trainer.state(), WeightVersion(tracker.run_id, progress.step, ""))
        save = _saver(config, job, trainer, tracker)
        progress = refine(
            config, job.model, job.tokenizer, job.source, job.objective, workers, tracker, progress, save,
            retention,
        )  # fmt: skip
        if progress.stopped:
            print(f"stopped early: {progress.stopped}", flush=True)
        save(progress)
        published = _publish(config, job, workers, progress, tracker.run_id)
        keeper.log(tracker, config.out / ADAPTER)
        after = frontier.measure("after")
        extra = {
            "refine_seconds": progress.seconds,
            "resumed_at_step": saved["step"] if saved else 0,
            "total_seconds": time.monotonic() - started,
            "data": job.digests,
            "published_step": published,
            "stopped": progress.stopped,
            **_upkeep(engines, job.verifier),
        }
        return conclude(config, tracker, job.tokenizer, job.source, before, after, progress, extra)


def record(config: RefineConfig) -> None:
    """The rollouts of the model as it is, for a later replay."""
    with ExitStack() as stack:
        job = _Job(config, stack)
        known = read_progress(config.out / "recording", job.fingerprint, resume=config.resume)
        tracker = job.open_tracker(resumed=known is not None, tags={})
        if known is None:
            shutil.rmtree(config.out / "rollouts", ignore_errors=True)
            with atomic_folder(config.out / "recording") as folder:
                write_progress(folder, job.fingerprint, {})
        engines = stack.enter_context(open_engines(config, job.folder, tracker, job.placement))
        record_rollouts(
            config, job.model, job.tokenizer, job.source, job.objective, engines.generate, job.verifier, tracker
        )  # fmt: skip


class _Job:
    """What is known before anything is tracked: model, tasks, verifier, objective."""

    def __init__(self, config: RefineConfig, stack: ExitStack) -> None:
        self.config, self._stack = config, stack
        self.start = start = given_model(config.model, config.tracking_uri or "", config.trainer.lora)
        assert start.source is not None
        self.address, self.folder, self.digest = start.address, start.source, start.digest
        # Chat template, generation settings and whatever else came with the user's checkpoint stays with it.
        self.origin = self.folder if config.model else None
        self.model, self.tokenizer = start.model, start.tokenizer
        self.objective = make_objective(config)
        recorded = _recorded(config)
        # Before anything of this job takes room.
        self.placement = None if config.in_process else place_actors(config)
        hosts: dict[str, str] = {}
        self._nodes: OtherNodes | None = stack.enter_context(open_nodes(config, hosts))
        self._hosts = hosts
        self.verifier = stack.enter_context(open_verifier(config, self.placement))
        chat = ChatTemplate(self.folder)
        self.source = open_tasks(config, self.model, self.tokenizer, chat, self.verifier)
        self.retention = open_retention(config, self.model, self.tokenizer, chat, self.source)
        self.excluded = [*self.source.excluded, *(self.retention.excluded if self.retention else ())]
        data = [*self.digests.values(), *recorded]
        self.fingerprint = _fingerprint(config, self.digest, data)

    @property
    def digests(self) -> dict[str, str]:
        """Of all data, as `NAME:DIGEST`."""
        retained = {"retained": self.retention.about.reference} if self.retention else {}
        return self.source.digests | retained

    def open_tracker(self, *, resumed: bool, tags: Mapping[str, str]) -> MlflowTracker:
        """The run's record, and what it says of this job."""
        facts = self._facts() | dict(tags)
        tracker = self._stack.enter_context(
            open_tracker(self.config, self.source, resumed=resumed, tags=facts)
        )
        if self.retention is not None:
            _log_side(tracker, self.retention.about, "training")
        if self.excluded:
            path = self.config.out / "excluded.json"
            rows = [asdict(one) for one in self.excluded]
            atomic_write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
            tracker.log_artifact(path)
        if self._nodes is not None:
            for node, sample in self._nodes.samples():
                tracker.watch(node, sample)
        return tracker

    def _facts(self) -> dict[str, str]:
        """Tags that only this job knows."""
        return {
            "model.family": self.model.family,
            "model.source": self.address,
            "model.source_digest": self.digest,
            **adapter_tags(self.config.trainer.lora),
            "data.digest": state_digest(self.digests.values()),
            "machine.accelerator": accelerator(),
            "machine.hosts": json.dumps(self._hosts),
            "machine.num_hosts": str(len(self._hosts)),
        }


def _recorded(config: RefineConfig) -> list[str]:
    """Digests of the files of a replay."""
    if config.replay is None:
        return []
    if config.replay.resolve().is_relative_to(config.out.resolve()):
        raise ConfigError(
            "replay", config.replay, f"a folder outside out={config.out}, which is written to", "set another out"
        )  # fmt: skip
    return [file_digest(path) for path in check_recorded(config.replay, config.steps)]


def make_objective(config: RefineConfig) -> RefineObjective:
    """The objective plug-in of a configuration. Raises ConfigError on an unknown name or option."""
    factory = resolve("objective", config.objective, OBJECTIVES)
    try:
        objective: RefineObjective = factory(**config.objective_options)
    except (TypeError, KeyError) as error:
        raise ConfigError(
            "objective_options",
            config.objective_options,
            f"keyword arguments of {factory.__name__}",
            str(error),
        ) from error
    return objective


@contextmanager
def open_tracker(
    config: RefineConfig, source: TaskSource, *, resumed: bool, tags: Mapping[str, str]
) -> Iterator[MlflowTracker]:
    """The run's MLflow writer, with its parameters and lineage."""
    plan = RunPlan(
        kind="refine", config=config, out=config.out, tracking_uri=config.tracking_uri, experiment=config.experiment,
        description="On-policy refinement: fewer forwards per answer at equal pass@1.", resumed=resumed,
        required=config.require_tracking, tags=tags,
    )  # fmt: skip
    with tracked_run(plan) as tracker:
        _log_side(tracker, source.held_out_set, "evaluation")
        _log_side(tracker, source.training_set, "training")
        yield tracker


def _log_side(tracker: MlflowTracker, own: TaskSet, context: Literal["training", "evaluation"]) -> None:
    tracker.log_dataset(
        own.name, digest=own.digest[:16], context=context, source=own.origin, profile=dict(own.profile)
    )


class _Frontier:
    """Measures the replicas' model on the held-out tasks and keeps every answer as Parquet."""

    def __init__(
        self, config: RefineConfig, source: TaskSource, generate: Generate, verifier: Verifier, tokenizer: Tokenizer
    ) -> None:  # fmt: skip
        self._config, self._source, self._generate, self._verifier = config, source, generate, verifier
        self._tokenizer = tokenizer

    def measure(self, name: str) -> list[FrontierPoint]:
        print(f"frontier {name} refinement, {len(self._source.held_out)} held-out tasks", flush=True)
        return measure(
            self._source.held_out, self._config.sweep.policies(), self._generate, self._verifier.verify,
            self._tokenizer, answers=self._source.answers,
            observe=lambda point, rollouts: self._keep(name, point, rollouts),
        )  # fmt: skip

    def _keep(self, name: str, point: FrontierPoint, rollouts: list[Rollout]) -> None:
        path = self._config.out / "trajectories" / f"{name}_{point.policy.label()}.parquet"
        write_rollouts(path, rollouts, {"policy": point.policy.model_dump(mode="json"), "model": name})


def _upkeep(engines: Engines, verifier: Verifier) -> dict[str, Any]:
    return {
        "replicas_replaced": engines.replaced,
        "verifiers_replaced": verifier.replaced,
        "isolation": verifier.isolation,
    }


def _fingerprint(config: RefineConfig, weights: str, data: Sequence[str]) -> str:
    """Configuration, starting weights and data."""
    kept = config.model_dump_json(exclude=FREE_ON_RESUME | dict.fromkeys(_TOLD_APART, True))
    return f"{weights} {state_digest(data)} {kept}"


def _starting_point(
    config: RefineConfig, saved: dict[str, Any] | None, trainer: Trainer, tracker: MlflowTracker
) -> Progress:
    """Step 0, or the checkpoint's step with its weights loaded and its curve told to the new tracker run."""
    if saved is None:
        # What an older run left in this folder is that run's.
        for stale in ("rollouts", "models", BEST):
            shutil.rmtree(config.out / stale, ignore_errors=True)
        return Progress(threshold=config.curriculum.start)
    trainer.load((config.out / "checkpoint").resolve())
    progress = Progress(**{**saved, "standing": Standing(**saved["standing"])})
    for row in progress.history:
        tracker.log_metrics({k: v for k, v in row.items() if k not in ("step", "seconds")}, int(row["step"]))
    print(f"resumed at step {progress.step}", flush=True)
    return progress


def _saver(
    config: RefineConfig, job: _Job, trainer: Trainer, tracker: MlflowTracker
) -> Callable[[Progress], None]:
    """Writes the checkpoint whole or not at all, and its weights as a model."""
    exports = ExportedModels(
        config.out / "models", config.keep_models, tracker, job.model, job.tokenizer, name=config.register_as,
        example=job.source.held_out[0].task.prompt, source=job.origin,
    )  # fmt: skip

    kept: dict[str, Any] = {}

    def save(progress: Progress) -> None:
        nonlocal kept
        values = asdict(progress)
        if values == kept:  # the last step ended in a checkpoint
            return
        with atomic_folder(config.out / "checkpoint") as folder:
            trainer.save(folder.resolve())
            write_progress(folder, job.fingerprint, values)
        keep_best(config.out / BEST, progress.standing)
        policy = rollout_policy(config, progress.threshold)
        exports.add(trainer.state(), progress.step, policy, progress.history)
        kept = values

    return save


def _publish(config: RefineConfig, job: _Job, workers: Workers, progress: Progress, run_id: str) -> int:
    """Write the model: the weights that looked best on held-out tasks where such looks were taken, else the last ones;
    the engines hold them afterwards. Returns their step."""
    state, step = workers.trainer.state(), progress.step
    best = progress.standing.best_step
    workers.keep_adapter(config.out / ADAPTER)
    if 0 <= best < step:
        folder = best_folder(config.out / BEST, best)
        state, step = load_state(folder, job.model), best
        if config.trainer.lora is not None:
            copy_adapter(folder / ADAPTER, config.out / ADAPTER)
        print(f"the weights of step {best} looked best on held-out tasks and are kept", flush=True)
    workers.push(state, WeightVersion(run_id, step, ""))
    save_model(config.out / "model", state, job.model, job.tokenizer, job.origin)
    return step
