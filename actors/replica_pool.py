"""The driver's side of generation: hands requests to replicas, replaces dead ones, pushes weights.

All Ray calls of rollouts are here. A replica that dies loses nothing but time: its chunk runs again elsewhere with
the same seeds and so gives the same answers, and a fresh actor takes its place, stale until a push of the expected
weights is proved. Ray's own restarts stay off: they would bring back an actor with old weights and tell nobody.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from fewstep.actors.deaths import cause_of_death
from fewstep.actors.dispatch import Dispatch
from fewstep.actors.engine.request import Request
from fewstep.actors.fleet import Fleet, State
from fewstep.actors.placement import on_node, require_room
from fewstep.actors.replica import Replica, ReplicaSettings, ReplicaStats
from fewstep.actors.weight_sync.base import Echo, Payload, Receipt, Receiver, WeightTransport
from fewstep.actors.weight_sync.object_store import ObjectStoreTransport
from fewstep.actors.weight_sync.shared_memory import SharedMemoryTransport
from fewstep.kernels.model.checkpoint import load_model, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import ActorDied, RequestError, UserError
from fewstep.platform.records import Trajectory, WeightVersion

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Call:
    """A remote call under way."""

    kind: Literal["start", "work", "life"]
    name: str


class ReplicaPool:
    """The driver's handle on all replicas; needs a running Ray session. One thread at a time may use it.

    Args:
        model_folder: what every replica loads; step 0 of `run_id`.
        num_replicas: engines, each in an actor of its own.
        run_id: names the weight versions.
        node_ids: where each replica starts while that node lives; empty = where Ray finds room.
    Raises:
        CheckpointError: the model folder cannot be used; before any actor starts.
        ResourceError: the cluster has too few free CPUs; says how many are free.
        ActorDied: no replica came up.
    """

    def __init__(
        self,
        model_folder: Path,
        num_replicas: int,
        *,
        run_id: str,
        settings: ReplicaSettings | None = None,
        node_ids: Sequence[str] = (),
    ) -> None:
        import ray

        self._ray: Any = ray
        self.settings = settings or ReplicaSettings()
        self.model_folder, self.run_id = Path(model_folder).resolve(), run_id
        model, _ = load_model(self.model_folder, self.settings.torch_dtype)
        self.config: ModelConfig = model.config
        require_room("replicas", num_replicas, self.settings.num_cpus)
        self._actor_class: Any = self._ray.remote(
            num_cpus=self.settings.num_cpus, max_restarts=0, max_task_retries=0, max_concurrency=4
        )(Replica)
        names = [f"replica-{index}" for index in range(num_replicas)]
        self._node_ids = dict(zip(names, node_ids, strict=True)) if node_ids else {}
        self.fleet = Fleet(
            names,
            time.monotonic,
            suspect_after_s=self.settings.suspect_after_s,
            dead_after_s=self.settings.dead_after_s,
            max_restarts=self.settings.max_restarts,
        )
        self._actors: dict[str, Any] = {}
        self._stats: dict[str, ReplicaStats] = {}
        self._calls: dict[Any, _Call] = {}
        self._transport: WeightTransport | None = None
        self._pushed: dict[str, torch.Tensor] = {}
        state = model.state_dict()
        version = WeightVersion(run_id, 0, state_checksum(state))
        try:
            for name in self.fleet.members:
                self._spawn(name)
            self.wait_started()
            # The first push doubles as a self-test of the transport before any work is done.
            self.push(state, version)
            self._require_serving()
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> WeightVersion:
        """The weights that serve."""
        if self.fleet.expected is None:
            raise ActorDied("replica pool", "no weights were ever pushed")
        return self.fleet.expected

    def generate(self, requests: Sequence[Request]) -> list[Trajectory]:
        """Trajectories in request order, whatever the number of replicas and whichever of them die on the way.

        Raises:
            RequestError: a bad request, before any starts; or one that failed in its replica.
            ActorDied: no replica is left, or one chunk has killed three.
        """
        self._validate(requests)
        self._question_suspects()
        self._admit_restarted()
        serving = len(self.fleet.names(State.HEALTHY, State.SUSPECT, State.STALE, State.RESTARTING))
        dispatch = Dispatch(len(requests), serving, min_chunk=self.settings.min_chunk)
        results: dict[int, Trajectory] = {}
        try:
            while not dispatch.finished:
                self._hand_out(dispatch, requests)
                self._wait_for_one(dispatch, results)
                for name in self.fleet.silence(dispatch.busy):
                    _log.warning("%s is killed: %s", name, self.fleet.members[name].cause)
                    self._discard(name)
                    self._rerun(dispatch, name)
                self._replace_dead()
        finally:
            self._calls = {ref: call for ref, call in self._calls.items() if call.kind == "start"}
        return [results[index] for index in range(len(requests))]

    def push(self, state: Mapping[str, torch.Tensor], version: WeightVersion) -> Receipt:
        """Bring new weights to every running replica; those that prove them serve, the others do not.

        Returns:
            A receipt that names replicas which did not take the push; a dead one never holds up the rest.
        """
        self._pushed = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        self._collect_starts()
        self.fleet.expect(version)
        receipt = self._send(self.fleet.names(State.STALE))
        self._replace_dead()
        return receipt

    def wait_started(self, timeout_s: float | None = None) -> None:
        """Wait until no replica is starting any more.

        Raises:
            ActorDied: one that neither came up nor died within the time.
        """
        deadline = time.monotonic() + (self.settings.start_timeout_s if timeout_s is None else timeout_s)
        while starting := self.fleet.names(State.RESTARTING):
            if time.monotonic() > deadline:
                raise ActorDied(", ".join(starting), "did not start in time; is a CPU free on the cluster?")
            starts = [ref for ref, call in self._calls.items() if call.kind == "start"]
            self._ray.wait(starts, num_returns=1, timeout=0.5)
            self._collect_starts()
            self._replace_dead()

    def stats(self) -> dict[str, ReplicaStats]:
        """Of every replica that runs; counters are since its start."""
        running = self.fleet.names(State.HEALTHY, State.SUSPECT, State.STALE)
        references = {name: self._actors[name].stats.remote() for name in running}
        for name, reference in references.items():
            try:
                self._stats[name] = self._ray.get(reference, timeout=self.settings.suspect_after_s)
            except self._ray.exceptions.RayActorError as error:
                self._bury(name, error)
            except self._ray.exceptions.GetTimeoutError:
                _log.warning("%s gave no statistics within %.0f s", name, self.settings.suspect_after_s)
        self._replace_dead()
        return {name: self._stats[name] for name in running if name in self._stats}

    def close(self) -> None:
        """End all replicas."""
        for name in self.fleet.members:
            self.fleet.retire(name)
            self._discard(name)
        if self._transport is not None:
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _validate(self, requests: Sequence[Request]) -> None:
        seen: set[str] = set()
        for request in requests:
            request.validate(self.config)
            if request.request_id in seen:
                raise RequestError("request_id", request.request_id, "ids used once", "choose another id")
            seen.add(request.request_id)

    def _spawn(self, name: str) -> None:
        placed = self._actor_class.options(**on_node(self._node_ids.get(name)))
        actor = placed.remote(self.model_folder, self.settings, self.run_id)
        self._actors[name] = actor
        self._calls[actor.stats.remote()] = _Call("start", name)

    def _hand_out(self, dispatch: Dispatch, requests: Sequence[Request]) -> None:
        if not dispatch.busy:
            self._require_serving()
        busy = set(dispatch.busy)
        for name in self.fleet.names(State.HEALTHY):
            if name not in busy and (chunk := dispatch.take(name)) is not None:
                self.fleet.alive(name)
                reference = self._actors[name].generate.remote(list(requests[chunk.start : chunk.stop]))
                self._calls[reference] = _Call("work", name)

    def _question_suspects(self) -> None:
        """Settle who was left suspect by a call that was broken off."""
        for name in self.fleet.names(State.SUSPECT):
            try:
                self._ray.get(self._actors[name].stats.remote(), timeout=self.settings.suspect_after_s)
                self.fleet.alive(name)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError) as error:
                self._bury(name, error)

    def _admit_restarted(self) -> None:
        """Give replacements that have come up since the last call the weights that serve."""
        self._collect_starts()
        if stale := self.fleet.names(State.STALE):
            self._send(stale)

    def _require_serving(self) -> None:
        """Make sure somebody serves: if nobody does, wait for restarts and push the expected weights again."""
        if self.fleet.names(State.HEALTHY, State.SUSPECT):
            return
        self._replace_dead()
        self.wait_started()
        self._send(self.fleet.names(State.STALE))
        if not self.fleet.names(State.HEALTHY):
            causes = "; ".join(f"{member.name}: {member.cause}" for member in self.fleet.members.values())
            raise ActorDied("every replica", causes)

    def _wait_for_one(self, dispatch: Dispatch, results: dict[int, Trajectory]) -> None:
        """Handle the next answer if one comes within a heartbeat."""
        ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=self.settings.heartbeat_s)
        for reference in ready:
            call = self._calls.pop(reference)
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayActorError as error:
                self._bury(call.name, error)
                self._rerun(dispatch, call.name)
                return
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            self._answered(call, answer, dispatch, results)
        self._ask_for_life(dispatch.busy)

    def _ask_for_life(self, busy: Sequence[str]) -> None:
        """One question at a time to each busy replica that has been quiet for a heartbeat."""
        asked = {call.name for call in self._calls.values() if call.kind == "life"}
        for name in busy:
            if name not in asked and self.fleet.quiet_s(name) >= self.settings.heartbeat_s:
                self._calls[self._actors[name].stats.remote()] = _Call("life", name)

    def _answered(self, call: _Call, answer: Any, dispatch: Dispatch, results: dict[int, Trajectory]) -> None:
        if call.kind == "start":
            self._stats[call.name] = answer
            self.fleet.started(call.name)
            return
        self.fleet.alive(call.name)
        if call.kind == "work":
            chunk = dispatch.done(call.name)
            results.update(zip(range(chunk.start, chunk.stop), pickle.loads(answer), strict=True))

    def _rerun(self, dispatch: Dispatch, name: str) -> None:
        if not dispatch.lost(name):
            raise ActorDied(
                name, f"the same requests killed several replicas; the last: {self.fleet.members[name].cause}"
            )

    def _collect_starts(self) -> None:
        starts = [ref for ref, call in self._calls.items() if call.kind == "start"]
        ready, _ = self._ray.wait(starts, num_returns=len(starts), timeout=0) if starts else ([], [])
        for reference in ready:
            call = self._calls.pop(reference)
            try:
                self._stats[call.name] = self._ray.get(reference)
                self.fleet.started(call.name)
            except self._ray.exceptions.RayActorError as error:
                self._bury(call.name, error)

    def _send(self, names: list[str]) -> Receipt:
        receivers = {name: self._receiver(name) for name in names}
        receipt = self._choose_transport().send(
            self._pushed, self.version, receivers, deadline_s=self.settings.push_deadline_s
        )
        for name, echo in receipt.echoes.items():
            self.fleet.admitted(name, echo.version)
        for name, failure in receipt.failures.items():
            if isinstance(failure, (self._ray.exceptions.RayActorError, TimeoutError)):
                # A late load must not land after the next push, so the slow one goes too.
                self._bury(name, failure)
            else:
                _log.warning("%s did not take push %s: %s", name, receipt.push_id, failure)
                self.fleet.refused(name, str(failure))
        return receipt

    def _receiver(self, name: str) -> Receiver:
        def receive(payload: Payload, version: WeightVersion) -> Future[Echo]:
            future: Future[Echo] = self._actors[name].load_weights.remote(payload, version).future()
            return future

        return receive

    def _choose_transport(self) -> WeightTransport:
        here = self._ray.get_runtime_context().get_node_id()
        local = all(stats.node_id == here for stats in self._stats.values())
        kind = self.settings.transport
        chosen = (
            SharedMemoryTransport
            if kind == "shared_memory" or (kind == "auto" and local)
            else ObjectStoreTransport
        )
        if not isinstance(self._transport, chosen):
            if self._transport is not None:
                self._transport.close()
            self._transport = chosen()
        return self._transport

    def _bury(self, name: str, error: BaseException) -> None:
        """Note a death and its cause, and make sure of it."""
        if self.fleet.state(name) not in (State.DEAD, State.RETIRED):
            cause = cause_of_death(error)
            self.fleet.died(name, cause)
            pid = self._stats[name].pid if name in self._stats else 0
            _log.warning("%s (pid %d) died: %s", name, pid, cause)
        self._discard(name)

    def _discard(self, name: str) -> None:
        self._calls = {ref: call for ref, call in self._calls.items() if call.name != name}
        self._stats.pop(name, None)
        actor = self._actors.pop(name, None)
        if actor is not None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)

    def _replace_dead(self) -> None:
        for name in self.fleet.names(State.DEAD):
            if self.fleet.restart(name):
                self._spawn(name)
            else:
                _log.error("%s died %d times and is retired", name, self.settings.max_restarts + 1)
