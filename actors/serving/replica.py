"""One Ray Serve replica: an engine on its own thread behind the HTTP application.

`fewstep.actors.replica` is the other kind of replica: it generates rollouts and takes new weights. This one
answers clients.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError

from fewstep.kernels.model.config import ComputeDtype
from fewstep.platform.errors import ActorDied
from fewstep.platform.records import DecodePolicy, WeightVersion

if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client.metrics_core import Metric
    from ray.serve import Application

    from fewstep.actors.serving.desk import DeskOptions

logger = logging.getLogger(__name__)

APPLICATION = "fewstep"
DEPLOYMENT = "fewstep"
# Requests that do not wait for the engine (health, metrics, refusals) beside those that do.
_BESIDE = 128
_GATHER_S = 5.0


@dataclass(frozen=True)
class EngineOptions:
    """How a replica's engine runs.

    Attributes:
        max_sequences: requests denoised together; more wait in the engine.
        dtype: to compute in; memory_bytes: for cached keys and values (see `Engine`).
    """

    max_sequences: int = 64
    dtype: ComputeDtype = "saved"
    memory_bytes: int | None = None


class ServingReplica:
    """Loads a model folder and serves it; one engine, one replica.

    Args:
        folder: a model folder every node can read.
        name: the model's name on the wire.
        policy: what a request that says nothing is decoded with.
        max_tokens: of one answer when the request does not say.
        engine: how its engine runs.
        num_threads: of torch.
        desk: who is let in, and what is written down.
        listen: host and port to listen on in this process; None = requests come through Serve's proxy.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        policy: DecodePolicy,
        max_tokens: int,
        engine: EngineOptions,
        num_threads: int,
        desk: DeskOptions,
        listen: tuple[str, int] | None = None,
    ) -> None:
        # A Ray worker imports this module before it knows what it is for; torch only where an engine lives.
        import torch

        from fewstep.actors.engine.engine import Engine
        from fewstep.actors.engine.host import EngineHost
        from fewstep.actors.serving.app import create_app
        from fewstep.actors.serving.chat import ChatTemplate
        from fewstep.actors.serving.desk import Desk
        from fewstep.actors.serving.front import Front
        from fewstep.actors.serving.service import CompletionService, ServedModel, created_of
        from fewstep.kernels.model.checkpoint import load_model, state_checksum

        torch.set_num_threads(num_threads)
        logging.getLogger("fewstep").setLevel(logging.INFO)
        path = Path(folder)
        model, tokenizer = load_model(path, None if engine.dtype == "saved" else getattr(torch, engine.dtype))
        version = WeightVersion(name, 0, state_checksum(model.state_dict()))
        host = EngineHost(
            Engine(
                model,
                tokenizer,
                max_sequences=engine.max_sequences,
                weight_version=version,
                memory_bytes=engine.memory_bytes,
            )
        )
        served = ServedModel(
            name, created_of(path), model.config, tokenizer, ChatTemplate(path), policy, max_tokens
        )
        self._service = CompletionService(host, served)
        replica = serve.get_replica_context().replica_id.unique_id
        self._desk = Desk(desk, lambda: {name: self._service.host}, replica, self._gather)
        self._front = Front(create_app(self._service, self._desk), *listen) if listen is not None else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve's hook: the application, built after the constructor."""
        from fewstep.actors.serving.app import create_app

        return create_app(self._service, self._desk)

    def drain(self) -> int:
        """Take nothing new from now on; how many requests are still being answered."""
        return self._desk.drain()

    def families(self) -> tuple[str, list[Metric]]:
        """This replica's name and its metrics."""
        return self._desk.replica, self._desk.metrics.families()

    async def _gather(self) -> dict[str, list[Metric]]:
        """Metrics of all replicas; one that is just ending or starting is left out of this page."""
        answers = serve.get_deployment_handle(DEPLOYMENT, APPLICATION).broadcast("families")
        found = dict([self.families()])
        try:
            others = await answers.results_async(timeout_s=_GATHER_S, return_exceptions=True)
            found.update(answer for answer in others if not isinstance(answer, Exception))
        except (RayError, RuntimeError, TimeoutError) as error:
            logger.warning("metrics of this replica alone: %s", error)
        return found

    def __del__(self) -> None:
        """Ray Serve's hook when it takes this replica away: open requests may finish, as long as Serve waits."""
        front = getattr(self, "_front", None)
        if front is not None:
            front.close()

    def check_health(self) -> None:
        """Ray Serve's hook: an error replaces this replica by a new one."""
        if not self._service.host.healthy:
            raise ActorDied("engine", "its thread has ended")
        if self._front is not None:
            self._front.check()


def application(
    folder: Path,
    name: str,
    *,
    policy: DecodePolicy,
    max_tokens: int,
    engine: EngineOptions,
    num_replicas: int,
    num_cpus: float,
    desk: DeskOptions,
    drain_s: float,
    listen: tuple[str, int] | None,
) -> Application:
    """The Ray Serve application of one model.

    Args:
        num_cpus: logical CPUs of each replica, and torch's threads, at least one.
        drain_s: what an ending replica gives the requests it has accepted.
        others: as ServingReplica's.
    """
    configure: Any = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=num_replicas,
        # The desk's queue is the fair and bounded one, so Serve holds nothing back that the desk would take or refuse.
        max_ongoing_requests=2 * engine.max_sequences + desk.limits.max_waiting + _BESIDE,
        ray_actor_options={"num_cpus": num_cpus},
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
    )
    ingress = serve.ingress()(ServingReplica)
    bound: Application = configure(ingress).bind(
        str(folder), name, policy, max_tokens, engine, max(1, int(num_cpus)), desk, listen
    )
    return bound
