"""The hands of a refinement: Ray pools, or one engine, sandbox and trainer in this process."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.actors.bundles import Need, Placement, place
from fewstep.actors.engine.engine import Engine
from fewstep.actors.judges import JudgeChoice
from fewstep.actors.node_metrics import OtherNodes
from fewstep.actors.placement import free_nodes, require_room
from fewstep.actors.replica import ReplicaSettings
from fewstep.actors.replica_pool import ReplicaPool
from fewstep.actors.trainer import TrainerGroup
from fewstep.actors.trainer_rank import TrainerRank
from fewstep.actors.verifier import LocalVerifier, Verifier, VerifierPool
from fewstep.kernels.model.checkpoint import load_model, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.frontier import Generate
from fewstep.pipelines.objectives import OBJECTIVES
from fewstep.pipelines.policy_update import Trainer
from fewstep.pipelines.rollouts import Push, State
from fewstep.pipelines.settings import VERIFIER_CPUS, RefineConfig
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import WeightVersion

RETAINING = "fewstep.pipelines.objectives.retaining:Retaining"


@dataclass(frozen=True)
class Engines:
    """What answers, and how it is given weights; `pool` is None in one process."""

    generate: Generate
    push: Push
    pool: ReplicaPool | None

    @property
    def replaced(self) -> int:
        """Replicas that died and were started again."""
        return 0 if self.pool is None else sum(member.restarts for member in self.pool.fleet.members.values())


def place_actors(config: RefineConfig) -> Placement:
    """Where everything will run, printed and kept beside the run's configuration.

    Raises:
        ResourceError: something does not fit; says what every node has free.
    """
    require_room("refinement", 1, config.total_cpus)
    needs = [
        Need("trainer ranks", config.trainer.num_ranks, config.trainer_cpus, packed=True),
        Need("replicas", config.num_replicas, config.replica_cpus),
        Need("verifiers", config.num_verifiers, VERIFIER_CPUS),
    ]
    placement = place(free_nodes(), needs, config.layout)
    atomic_write_text(config.out / "placement.json", json.dumps(placement.as_data(), indent=2) + "\n")
    print(placement.text(), flush=True)
    return placement


@contextmanager
def open_verifier(config: RefineConfig, placement: Placement | None) -> Iterator[Verifier]:
    """The configuration's judge, in as many sandboxes as it says. Without a placement, one in this process.

    Raises:
        ConfigError: an unknown verifier or option.
        ResourceError: no room, or a host that cannot isolate as asked.
    """
    judge = JudgeChoice(config.verifier, config.verifier_options)
    judge.build()  # refused before any process starts
    if placement is None:
        with LocalVerifier(1, judge=judge, require=config.sandbox_requires) as local:
            yield local
        return
    with VerifierPool(
        config.num_verifiers, num_cpus=VERIFIER_CPUS, judge=judge, require=config.sandbox_requires,
        node_ids=placement.node_ids("verifiers"),
    ) as pool:  # fmt: skip
        yield pool


@contextmanager
def open_nodes(config: RefineConfig, tracker_of: dict[str, str]) -> Iterator[OtherNodes | None]:
    """Samplers on the cluster's other nodes, none in one process; their hosts are added to `tracker_of`."""
    if config.in_process:
        tracker_of["driver"] = socket.gethostname()
        yield None
        return
    with OtherNodes() as nodes:
        tracker_of |= nodes.hosts
        yield nodes


@contextmanager
def open_engines(
    config: RefineConfig, folder: Path, tracker: MlflowTracker, placement: Placement | None
) -> Iterator[Engines]:
    """Engines on a model folder; they hold step 0 of the tracker's run. Without a placement, one in this process."""
    if placement is None:
        model, tokenizer = load_model(folder, torch.float32)
        checksum = state_checksum(model.state_dict())
        engine = Engine(
            model, tokenizer, max_sequences=config.max_sequences,
            weight_version=WeightVersion(tracker.run_id, 0, checksum),
        )  # fmt: skip

        def load(state: State, version: WeightVersion) -> dict[str, float]:
            engine.load_weights(state, WeightVersion(version.run_id, version.step, state_checksum(state)))
            return {}

        yield Engines(engine.generate, load, None)
        return
    # The type the trainer keeps, whatever the type on disk: pushes are proved by the tensors' bytes.
    settings = ReplicaSettings(
        config.max_sequences, "float32", config.replica_cpus, transport=config.weight_transport
    )
    with ReplicaPool(
        folder, config.num_replicas, run_id=tracker.run_id, settings=settings,
        node_ids=placement.node_ids("replicas"),
    ) as pool:  # fmt: skip

        def push(state: Mapping[str, torch.Tensor], version: WeightVersion) -> dict[str, float]:
            receipt = pool.push(state, WeightVersion(version.run_id, version.step, state_checksum(state)))
            return {"sync/seconds": receipt.seconds, "sync/bytes": float(receipt.num_bytes)}

        yield Engines(pool.generate, push, pool)


def minimised(config: RefineConfig) -> tuple[str, Mapping[str, Any]]:
    """Dotted path and keyword arguments of what the ranks minimise: the objective, or the objective beside retention."""
    objective = OBJECTIVES.get(config.objective, config.objective)
    if config.retain is None:
        return objective, config.objective_options
    options = {
        "objective": objective, "options": config.objective_options, "weight": config.retain.weight,
        "form": config.retain.form,
    }  # fmt: skip
    return RETAINING, options


@contextmanager
def open_trainer(
    config: RefineConfig, model: ModelConfig, folder: Path, placement: Placement | None
) -> Iterator[Trainer]:
    """Trainer ranks that start from a model folder. Without a placement, one in this process."""
    objective, options = minimised(config)
    if placement is None:
        rank = TrainerRank(model, folder, config.trainer, objective, options)
        rank.connect(0, *rank.endpoint())
        yield rank
        return
    group = TrainerGroup(
        model, folder, config.trainer, objective, options, num_cpus=config.trainer_cpus,
        node_id=placement.node_ids("trainer ranks")[0], replay=config.out / "diverged-batch.npz",
    )  # fmt: skip
    try:
        yield group
    finally:
        group.close()
