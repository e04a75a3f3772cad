"""One Ray Serve replica: an engine on its own thread behind the HTTP application.

`fewstep.actors.replica` is the other kind of replica: it generates rollouts and takes new weights. This one
answers clients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray import serve

from fewstep.actors.serving.model_source import ModelSource
from fewstep.kernels.model.config import ComputeDtype
from fewstep.platform.errors import ActorDied
from fewstep.platform.records import DecodePolicy

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

DEPLOYMENT = "fewstep"
_DRAIN_S = 5.0


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
    """Loads model folders and serves them; an engine for each, all in one replica.

    Args:
        sources: the models; those found by an alias follow it.
        policy: what a request that says nothing is decoded with.
        max_tokens: of one answer when the request does not say.
        engine: how each engine runs.
        num_threads: of torch.
        alias_poll_s: seconds between two looks at an alias.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        policy: DecodePolicy,
        max_tokens: int,
        engine: EngineOptions,
        num_threads: int,
        alias_poll_s: float,
    ) -> None:
        # A Ray worker imports this module before it knows what it is for; torch only where an engine lives.
        import torch

        from fewstep.actors.serving.alias_follower import AliasFollower
        from fewstep.actors.serving.loading import load_service

        torch.set_num_threads(num_threads)
        logging.getLogger("fewstep").setLevel(logging.INFO)
        options = asdict(engine)
        self._services = [load_service(source, policy, max_tokens, **options) for source in sources]
        for source, service in zip(sources, self._services, strict=True):
            if source.alias:
                AliasFollower(service, source, engine.dtype, alias_poll_s).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve's hook: the application, built after the constructor."""
        from fewstep.actors.serving.app import create_app

        return create_app(*self._services)

    def check_health(self) -> None:
        """Ray Serve's hook: an error replaces this replica by a new one."""
        if not all(service.host.healthy for service in self._services):
            raise ActorDied("engine", "its thread has ended")


def application(
    sources: Sequence[ModelSource],
    *,
    policy: DecodePolicy,
    max_tokens: int,
    engine: EngineOptions,
    num_replicas: int,
    num_cpus: float,
    alias_poll_s: float,
) -> Application:
    """The Ray Serve application of one endpoint.

    Args:
        num_cpus: logical CPUs of each replica, and torch's threads, at least one.
        others: as ServingReplica's.
    """
    configure: Any = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=num_replicas,
        # The engine's own queue is the fair one; Serve holds back only what would make replicas uneven.
        max_ongoing_requests=2 * engine.max_sequences * len(sources),
        ray_actor_options={"num_cpus": num_cpus},
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
    )
    ingress = serve.ingress()(ServingReplica)
    bound: Application = configure(ingress).bind(
        tuple(sources), policy, max_tokens, engine, max(1, int(num_cpus)), alias_poll_s
    )
    return bound
