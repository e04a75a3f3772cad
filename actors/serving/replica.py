"""One Ray Serve replica: the HTTP application, and its engines in processes of their own.

`fewstep.actors.replica` is the other kind of replica: it generates rollouts and takes new weights. This one
answers clients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError

from fewstep.actors.serving.engine_source import EngineOptions
from fewstep.actors.serving.load_signal import load_of, together
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.scaling_config import Routing, ScalingConfig
from fewstep.actors.serving.serve_policies import deployment_options
from fewstep.platform.records import DecodePolicy

if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client.metrics_core import Metric
    from ray.serve import Application

    from fewstep.actors.engine.host import EngineHost
    from fewstep.actors.serving.desk import DeskOptions
    from fewstep.actors.serving.service import CompletionService

logger = logging.getLogger(__name__)

APPLICATION = "fewstep"
DEPLOYMENT = "fewstep"
# Requests that do not wait for the engine (health, metrics, refusals) beside those that do.
_BESIDE = 128
_GATHER_S = 5.0


class ServingReplica:
    """Loads model folders and serves them; an engine for each, all in one replica.

    Args:
        sources: the models; those found by an alias follow it.
        policy: what a request that says nothing is decoded with.
        max_tokens: of one answer when the request does not say.
        engine: how each engine runs.
        num_cpus: logical CPUs of each rank, and torch's threads in each engine's process, at least one.
        alias_poll_s: seconds between two looks at an alias.
        desk: who is let in, and what is written down.
        listen: host and port to listen on in this process; None = requests come through Serve's proxy.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        policy: DecodePolicy,
        max_tokens: int,
        engine: EngineOptions,
        num_cpus: float,
        alias_poll_s: float,
        desk: DeskOptions,
        listen: tuple[str, int] | None = None,
    ) -> None:
        # A Ray worker imports this module before it knows what it is for.
        from fewstep.actors.ranks import RankGroup
        from fewstep.actors.serving.alias_follower import AliasFollower
        from fewstep.actors.serving.app import create_app
        from fewstep.actors.serving.desk import Desk
        from fewstep.actors.serving.front import Front
        from fewstep.actors.serving.loading import load_service

        logging.getLogger("fewstep").setLevel(logging.INFO)
        self._ranks = (
            RankGroup(
                engine.num_ranks,
                len(sources),
                num_cpus,
                one_node=engine.one_node,
                deadline_s=engine.rank_deadline_s,
            )
            if engine.num_ranks > 1
            else None
        )
        self._services: list[CompletionService] = []
        try:
            for source in sources:
                with self._sharded(engine) as options:
                    self._services.append(
                        load_service(source, policy, max_tokens, options, max(1, int(num_cpus)))
                    )
        except BaseException:
            self._close_engines()
            raise
        for source, service in zip(sources, self._services, strict=True):
            if source.alias:
                AliasFollower(service, source, engine.dtype, alias_poll_s).start()
        replica = serve.get_replica_context().replica_id.unique_id
        self._desk = Desk(desk, self._engines, replica, self._gather)
        self._num_reports = 0
        self._front = (
            Front(create_app(*self._services, desk=self._desk), *listen) if listen is not None else None
        )

    @contextmanager
    def _sharded(self, engine: EngineOptions) -> Iterator[EngineOptions]:
        """Options of one model's engine, which is rank 0 of its ranks if it has others."""
        if self._ranks is None:
            yield engine
            return
        with self._ranks.meeting() as meeting:
            yield replace(engine, place=meeting.place, listener=meeting.fileno())

    def _engines(self) -> dict[str, EngineHost]:
        return {service.model.name: service.host for service in self._services}

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve's hook: the application, built after the constructor."""
        from fewstep.actors.serving.app import create_app

        return create_app(*self._services, desk=self._desk)

    def drain(self) -> int:
        """Take nothing new from now on; how many requests are still being answered."""
        return self._desk.drain()

    def families(self) -> tuple[str, list[Metric]]:
        """This replica's name and its metrics."""
        return self._desk.replica, self._desk.metrics.families()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve's hook: what this replica has before it (`Load`)."""
        waiting = self._desk.num_waiting()
        engines = self._engines().items()
        return together(load_of(host.measures(), waiting[name]) for name, host in engines).as_stats()

    def record_routing_stats(self) -> dict[str, float]:
        """Ray Serve's hook: the same, with a number by which two reports are told apart."""
        self._num_reports += 1
        return {**self.record_autoscaling_stats(), "report": self._num_reports}

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
        self._close_engines()

    def _close_engines(self) -> None:
        for service in getattr(self, "_services", ()):
            service.host.close()

    def check_health(self) -> None:
        """Ray Serve's hook: an error replaces this replica by a new one."""
        # Engines first: without them their ranks end, too, and theirs is not the cause to show.
        for service in self._services:
            if service.host.death is not None:
                raise service.host.death
        if self._ranks is not None:
            self._ranks.check()
        if self._front is not None:
            self._front.check()


def application(
    sources: Sequence[ModelSource],
    *,
    policy: DecodePolicy,
    max_tokens: int,
    engine: EngineOptions,
    num_replicas: int,
    num_cpus: float,
    alias_poll_s: float,
    desk: DeskOptions,
    drain_s: float,
    listen: tuple[str, int] | None,
    scaling: ScalingConfig,
    routing: Routing,
) -> Application:
    """The Ray Serve application of one endpoint.

    Args:
        num_cpus: logical CPUs of each rank of each replica.
        drain_s: what an ending replica gives the requests it has accepted.
        scaling, routing: how many replicas, in place of `num_replicas`, and which one a request goes to.
        others: as ServingReplica's.
    """
    configure: Any = serve.deployment(
        name=DEPLOYMENT,
        # The desk's queue is the fair and bounded one, so Serve holds nothing back that the desk would take or refuse.
        max_ongoing_requests=(2 * engine.max_sequences + desk.limits.max_waiting) * len(sources) + _BESIDE,
        ray_actor_options={"num_cpus": num_cpus},
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        **deployment_options(num_replicas, scaling, routing),
        **_group(engine, num_cpus),
    )
    ingress = serve.ingress()(ServingReplica)
    bound: Application = configure(ingress).bind(
        tuple(sources), policy, max_tokens, engine, num_cpus, alias_poll_s, desk, listen
    )
    return bound


def _group(engine: EngineOptions, num_cpus: float) -> dict[str, Any]:
    """A placement group for each replica with other ranks: its own bundle is the first."""
    if engine.num_ranks == 1:
        return {}
    return {
        "placement_group_bundles": [{"CPU": num_cpus}] * engine.num_ranks,
        "placement_group_strategy": "STRICT_PACK" if engine.one_node else "PACK",
    }
