"""A generation replica: one engine in a Ray actor. Thin; the pool (actors/replica_pool.py) drives it."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.actors.engine.request import Request
from fewstep.actors.weight_sync.base import Echo, Payload
from fewstep.actors.weight_sync.transport_name import TransportName
from fewstep.kernels.model.config import ComputeDtype
from fewstep.platform.records import WeightVersion

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ReplicaSettings:
    """How replicas run and when they are given up.

    Attributes:
        max_sequences: requests that share a forward of one replica.
        dtype: to compute in. Replicas that take pushes need the trainer's, whatever the type on disk: a push is proved by
            the checksum of the receiver's tensors.
        num_cpus: logical CPUs reserved for each.
        min_chunk: requests handed out at once, at least.
        transport: how weights travel; auto = shared memory if every replica is on this node, else the object store.
        heartbeat_s, suspect_after_s, dead_after_s: a working replica is asked for a sign of life this often, and
            is given no new work, then killed, after so much silence.
        start_timeout_s: a start may take this long, an interpreter and torch included.
        push_deadline_s: a replica that has not echoed a push by then is killed and replaced.
        max_restarts: deaths after which a replica is not replaced any more.
    """

    max_sequences: int = 64
    dtype: ComputeDtype = "saved"
    num_cpus: float = 1.0
    min_chunk: int = 8
    transport: TransportName = "auto"
    heartbeat_s: float = 2.0
    suspect_after_s: float = 15.0
    dead_after_s: float = 90.0
    start_timeout_s: float = 180.0
    push_deadline_s: float = 60.0
    max_restarts: int = 3

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """As `load_model` takes it; None = as saved."""
        import torch

        return (
            None
            if self.dtype == "saved"
            else {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        )


@dataclass(frozen=True)
class ReplicaStats:
    """Where a replica runs and what its engine has done since it started."""

    pid: int
    node_id: str
    version: WeightVersion
    forwards: int
    committed_tokens: int
    rows: int


class Replica:
    """One engine in a process of its own. Calls come on several threads; the lock lets one at a time at the engine."""

    def __init__(self, model_folder: Path, settings: ReplicaSettings, run_id: str) -> None:
        import ray
        import torch

        from fewstep.actors.engine.engine import Engine
        from fewstep.kernels.model.checkpoint import load_model, state_checksum

        torch.set_num_threads(1)
        model, tokenizer = load_model(model_folder, settings.torch_dtype)
        version = WeightVersion(run_id, 0, state_checksum(model.state_dict()))
        self._engine = Engine(model, tokenizer, max_sequences=settings.max_sequences, weight_version=version)
        self._lock = threading.Lock()
        self._node_id: str = ray.get_runtime_context().get_node_id()

    def generate(self, requests: Sequence[Request]) -> bytes:
        """Pickled trajectories in request order; bytes, so that the driver's copies do not pin Ray's object store."""
        with self._lock:
            return pickle.dumps(self._engine.generate(requests), protocol=5)

    def load_weights(self, payload: Payload, version: WeightVersion) -> Echo:
        """Swap the weights; the echo's checksum is taken from the engine's own tensors afterwards."""
        from fewstep.kernels.model.checkpoint import state_checksum

        with self._lock, payload.open() as state:
            self._engine.load_weights(state, version)
            return Echo(self._engine.weight_version, state_checksum(self._engine.model.state_dict()))

    def stats(self) -> ReplicaStats:
        """Answers while the engine works: this is the sign of life."""
        engine = self._engine
        return ReplicaStats(
            os.getpid(),
            self._node_id,
            engine.weight_version,
            engine.forwards,
            engine.committed_tokens,
            engine.rows,
        )
