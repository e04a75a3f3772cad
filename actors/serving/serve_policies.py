"""Ray Serve's two hooks for load: how many replicas there should be, and which one a request goes to."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from fewstep.actors.serving.load_signal import wanted_replicas
from fewstep.actors.serving.prefix_routing import order
from fewstep.actors.serving.scaling_config import Routing, ScalingConfig

_HERE = "fewstep.actors.serving.serve_policies"
_FIRST_REQUEST_S = 1e-3  # before any replica knows what a request takes


class WorkPolicy:
    """As many replicas as are through with all there is in `backlog_s` seconds. Serve applies bounds and delays."""

    def __init__(self, backlog_s: float) -> None:
        self._backlog_s = backlog_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = (context.aggregated_metrics or {}).get("seconds_left", {})
        if not reported:
            return context.target_num_replicas, {}
        return wanted_replicas(list(reported.values()), self._backlog_s), {}


class LoadRouter(FIFOMixin, RequestRouter):
    """Asks the replica with the least work of two, one of them the home of the prompt's beginning.

    Reports of replicas are up to a period old, so what this router has sent to each since counts on top: without that
    all requests of a period would go to the one that was idle at its start. First come, first served: where several requests
    wait for a replica that accepts, the first of them takes it, at home there or not.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Serve's hook, with `request_router_kwargs`."""
        self._prefix, self._slack_s = bool(kwargs["prefix"]), float(kwargs["slack_s"])
        # Routers of several proxies should not agree with each other.
        self._random = np.random.default_rng()
        self._reports: dict[ReplicaID, float] = {}
        self._sent: dict[ReplicaID, int] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's hook: ranks of replicas, asked one after the other until one accepts."""
        if not candidate_replicas:
            return []
        usual_s = max(_of(replica, "request_s") for replica in candidate_replicas) or _FIRST_REQUEST_S
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self._load_s(replica, usual_s) for name, replica in by_name.items()}
        key = pending_request.metadata.session_id if self._prefix and pending_request is not None else ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all that were asked are full
        return [[by_name[name]] for name in order(loads, self._random, key, self._slack_s)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Serve's hook."""
        super().on_send_request(replica_id)
        self._sent[replica_id] = self._sent.get(replica_id, 0) + 1

    def _load_s(self, replica: RunningReplica, usual_s: float) -> float:
        name, report = replica.replica_id, _of(replica, "report")
        if self._reports.get(name) != report:
            self._reports[name], self._sent[name] = report, 0
        return _of(replica, "seconds_left") + self._sent.get(name, 0) * usual_s


def _of(replica: RunningReplica, key: str) -> float:
    return float((replica.routing_stats or {}).get(key, 0.0))


def deployment_options(num_replicas: int, scaling: ScalingConfig, routing: Routing) -> dict[str, Any]:
    """Keyword arguments of `serve.deployment`: how many replicas, and which router."""
    # Serve's pydantic classes are typed for the mypy of another version.
    policy, router = cast(Any, AutoscalingPolicy), cast(Any, RequestRouterConfig)
    options: dict[str, Any] = {"num_replicas": num_replicas}
    if scaling.on:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scaling.min_replicas,
                max_replicas=scaling.max_replicas,
                upscale_delay_s=scaling.up_delay_s,
                downscale_delay_s=scaling.down_delay_s,
                metrics_interval_s=scaling.interval_s,
                look_back_period_s=2 * scaling.interval_s,
                policy=policy(
                    policy_function=f"{_HERE}:WorkPolicy", policy_kwargs={"backlog_s": scaling.backlog_s}
                ),
            )
        }
    if routing != "requests":
        options["request_router_config"] = router(
            request_router_class=f"{_HERE}:LoadRouter",
            # A prompt's home may have as much more to do as a replica is meant to have.
            request_router_kwargs={"prefix": routing == "prefix", "slack_s": scaling.backlog_s},
            request_routing_stats_period_s=scaling.interval_s,
        )
    return options
