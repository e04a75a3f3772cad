"""`fewstep refine`: everything around the on-policy loop.

Measure the frontier, refine, measure again on the same held-out tasks, write the report and the figures, register
the model. The loop itself is in refine.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fewstep.actors.node_metrics import OtherNodes
from fewstep.actors.placement import require_room
from fewstep.actors.replica import ReplicaSettings
from fewstep.actors.replica_pool import ReplicaPool
from fewstep.actors.trainer import TrainerGroup
from fewstep.actors.verifier import VerifierPool
from fewstep.kernels.model.checkpoint import load_state, load_tokenizer, save_model, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.exported_models import ExportedModels
from fewstep.pipelines.frontier import measure
from fewstep.pipelines.models import model_folder
from fewstep.pipelines.objectives import OBJECTIVES
from fewstep.pipelines.objectives.credit import RefineObjective
from fewstep.pipelines.progress import read_progress, write_progress
from fewstep.pipelines.refine import Progress, Workers, draw_tasks, refine, rollout_policy
from fewstep.pipelines.refine_report import HELD_OUT, RefineResult, conclude
from fewstep.pipelines.settings import VERIFIER_CPUS, RefineConfig
from fewstep.pipelines.tasks.family import tasks as family_tasks
from fewstep.pipelines.tracked_run import RunPlan, accelerator, tracked_run
from fewstep.platform.artifacts import atomic_folder
from fewstep.platform.errors import ConfigError
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import FrontierPoint, Rollout, Task, WeightVersion
from fewstep.platform.registry import resolve
from fewstep.platform.trajectories import write_rollouts

HELD_OUT_SEED = 0
MODEL_FAMILY = "block-diffusion"
# Where and how a run is recorded is no part of what it computes.
UNTRACKED = {
    "tracking_uri": None, "require_tracking": True, "experiment": "", "register_as": "", "keep_models": 1,
    "traces_per_step": 0.0,
}  # fmt: skip


def run(config: RefineConfig, tags: Mapping[str, str] | None = None) -> RefineResult:
    """The whole job inside an open Ray session.

    Args:
        tags: more tags of the run; `mlflow.parentRunId` nests it under another.
    """
    started = time.monotonic()
    folder = model_folder(config.model, config.tracking_uri or "")
    model = ModelConfig.load(folder)
    tokenizer = load_tokenizer(folder, model)
    objective = make_objective(config)
    fingerprint = _fingerprint(config, state_checksum(load_state(folder, model)))
    # Everything that can be refused is refused here, before anything is started or written.
    saved = read_progress(config.out / "checkpoint", fingerprint, resume=config.resume)
    require_room("refinement", 1, config.total_cpus)
    held_out = family_tasks(config.num_eval_tasks, HELD_OUT_SEED, held_out=True)
    data = _data_digests(config, held_out)
    with ExitStack() as stack:
        nodes = stack.enter_context(OtherNodes())
        facts = _run_facts(config, data, nodes) | dict(tags or {})
        tracker = stack.enter_context(
            open_tracker(config, held_out, data, resumed=saved is not None, tags=facts)
        )
        for node, sample in nodes.samples():
            tracker.watch(node, sample)
        settings = ReplicaSettings(
            max_sequences=config.max_sequences, num_cpus=config.replica_cpus, dtype="float32"
        )
        pool = stack.enter_context(
            ReplicaPool(folder, config.num_replicas, run_id=tracker.run_id, settings=settings)
        )
        verifiers = stack.enter_context(VerifierPool(config.num_verifiers, num_cpus=VERIFIER_CPUS))
        trainer = TrainerGroup(
            model, folder, config.trainer, OBJECTIVES.get(config.objective, config.objective),
            config.objective_options, num_cpus=config.trainer_cpus, replay=config.out / "diverged-batch.npz",
        )  # fmt: skip
        stack.callback(trainer.close)
        frontier = _Frontier(config, held_out, pool, verifiers, tokenizer)
        before = frontier.measure("before")
        workers = Workers(pool.generate, verifiers.verify, trainer, _pusher(pool))
        progress = _starting_point(config, saved, trainer, tracker)
        # The replicas hold the starting weights; a resumed run's are the checkpoint's.
        workers.push(trainer.state(), WeightVersion(tracker.run_id, progress.step, ""))
        exports = ExportedModels(
            config.out / "models", config.keep_models, tracker, model, tokenizer, name=config.register_as,
            example=held_out[0].prompt,
        )  # fmt: skip
        save = _saver(config, fingerprint, trainer, exports)
        progress = refine(config, model, tokenizer, objective, workers, tracker, progress, save)
        save(progress)
        after = frontier.measure("after")
        save_model(config.out / "model", trainer.state(), model, tokenizer, source=folder)
        extra = {
            "refine_seconds": progress.seconds,
            "resumed_at_step": saved["step"] if saved else 0,
            "total_seconds": time.monotonic() - started,
            "data": data,
            "replicas_replaced": sum(member.restarts for member in pool.fleet.members.values()),
            "verifiers_replaced": verifiers.replaced,
            "isolation": verifiers.isolation,
        }
        return conclude(config, tracker, tokenizer, before, after, progress, extra)


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


def _run_facts(config: RefineConfig, data: Mapping[str, str], nodes: OtherNodes) -> dict[str, str]:
    """Tags that only this job knows."""
    return {
        "model.family": MODEL_FAMILY,
        "model.started_from": config.model or "embedded",
        "data.digest": state_digest(data.values()),
        "machine.accelerator": accelerator(),
        "machine.hosts": json.dumps(nodes.hosts),
        "machine.num_hosts": str(len(nodes.hosts)),
    }


def _data_digests(config: RefineConfig, held_out: list[Task]) -> dict[str, str]:
    """What each side's data are known by. The training side is a stream keyed by (seed, step): its first step stands
    for it, and the rollouts' own digest is logged at the end."""
    first = draw_tasks(config.seed, 0, config.prompts_per_step)
    return {
        "held_out": f"{HELD_OUT}:{state_digest(task.task_id for task in held_out)[:16]}",
        "training": f"family-training:{state_digest([f'seed {config.seed}', *(task.task_id for task in first)])[:16]}",
    }


@contextmanager
def open_tracker(
    config: RefineConfig, held_out: list[Task], data: Mapping[str, str], *, resumed: bool, tags: Mapping[str, str]
) -> Iterator[MlflowTracker]:  # fmt: skip
    """The run's MLflow writer, with its parameters and lineage."""
    plan = RunPlan(
        kind="refine", config=config, out=config.out, tracking_uri=config.tracking_uri, experiment=config.experiment,
        description="On-policy refinement: fewer forwards per answer at equal pass@1.", resumed=resumed,
        required=config.require_tracking, tags=tags,
    )  # fmt: skip
    with tracked_run(plan) as tracker:
        tracker.log_dataset(
            HELD_OUT, digest=data["held_out"].partition(":")[2], context="evaluation",
            source="distinct specifications of the embedded family, held out by hash",
            profile={"num_tasks": len(held_out)},
        )  # fmt: skip
        tracker.log_dataset(
            "family-training", digest=data["training"].partition(":")[2], context="training",
            source=f"specifications of the training side, keyed by (seed {config.seed}, step)",
            profile={"prompts_per_step": config.prompts_per_step, "group_size": config.group_size},
        )  # fmt: skip
        yield tracker


def state_digest(parts: Iterable[str]) -> str:
    """A hexadecimal digest of a sequence of strings, order included."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


class _Frontier:
    """Measures the replicas' model on the held-out tasks and keeps every answer as Parquet."""

    def __init__(
        self,
        config: RefineConfig,
        held_out: list[Task],
        pool: ReplicaPool,
        verifiers: VerifierPool,
        tokenizer: Tokenizer,
    ) -> None:
        self._config, self._tasks, self._pool, self._verifiers = config, held_out, pool, verifiers
        self._tokenizer = tokenizer

    def measure(self, name: str) -> list[FrontierPoint]:
        print(f"frontier {name} refinement, {len(self._tasks)} held-out tasks", flush=True)
        return measure(
            self._tasks, self._config.sweep.policies(), self._pool.generate, self._verifiers.verify, self._tokenizer,
            max_tokens=self._config.max_tokens, observe=lambda point, rollouts: self._keep(name, point, rollouts),
        )  # fmt: skip

    def _keep(self, name: str, point: FrontierPoint, rollouts: list[Rollout]) -> None:
        path = self._config.out / "trajectories" / f"{name}_{point.policy.label()}.parquet"
        write_rollouts(path, rollouts, {"policy": point.policy.model_dump(mode="json"), "model": name})


def _pusher(pool: ReplicaPool) -> Callable[[Mapping[str, torch.Tensor], WeightVersion], dict[str, float]]:
    def push(state: Mapping[str, torch.Tensor], version: WeightVersion) -> dict[str, float]:
        receipt = pool.push(state, WeightVersion(version.run_id, version.step, state_checksum(state)))
        return {"sync/seconds": receipt.seconds, "sync/bytes": float(receipt.num_bytes)}

    return push


def _fingerprint(config: RefineConfig, weights: str) -> str:
    """Configuration and starting weights; where a run is kept is not part of what it computes."""
    kept = config.model_copy(update={"out": Path(), "resume": True, "model": "", **UNTRACKED})
    return f"{weights} {kept.model_dump_json()}"


def _starting_point(
    config: RefineConfig, saved: dict[str, Any] | None, trainer: TrainerGroup, tracker: MlflowTracker
) -> Progress:
    """Step 0, or the checkpoint's step with its weights loaded and its curve told to the new tracker run."""
    if saved is None:
        # Rollouts and checkpoints of an older run in this folder are that run's.
        for stale in ("rollouts", "models"):
            shutil.rmtree(config.out / stale, ignore_errors=True)
        return Progress(threshold=config.curriculum.start)
    trainer.load((config.out / "checkpoint").resolve())
    progress = Progress(**saved)
    for row in progress.history:
        tracker.log_metrics({k: v for k, v in row.items() if k not in ("step", "seconds")}, int(row["step"]))
    print(f"resumed at step {progress.step}", flush=True)
    return progress


def _saver(
    config: RefineConfig, fingerprint: str, trainer: TrainerGroup, exports: ExportedModels
) -> Callable[[Progress], None]:
    """Writes the checkpoint whole or not at all, and its weights as a model."""

    def save(progress: Progress) -> None:
        with atomic_folder(config.out / "checkpoint") as folder:
            trainer.save(folder.resolve())
            write_progress(folder, fingerprint, asdict(progress))
        policy = rollout_policy(config, progress.threshold)
        exports.add(trainer.state(), progress.step, policy, progress.history)

    return save
