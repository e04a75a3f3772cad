"""`fewstep serve`: a model behind Ray Serve on this machine, up until the block or the process ends."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fewstep.actors.bundles import Need, Node, place
from fewstep.actors.serving.access_log import LogConfig
from fewstep.actors.serving.limits import LimitsConfig
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.scaling_config import Routing, ScalingConfig
from fewstep.actors.serving.tracing import require_tracing
from fewstep.cluster.admission import check_access, drain, ending
from fewstep.cluster.served_models import AdaptedModel, check_model, check_sharding, model_sources
from fewstep.kernels.model.config import ComputeDtype
from fewstep.platform.artifacts import weights_digest
from fewstep.platform.config import Config
from fewstep.platform.errors import ActorDied, ResourceError
from fewstep.platform.ports import free_port
from fewstep.platform.records import DecodePolicy

logger = logging.getLogger(__name__)

_READY_S = 60.0
_WATCH_S = 5.0
_SHUTDOWN_S = 30.0
# Left at 5 s, a proxy that is still importing on a busy machine is killed as broken, and the start fails.
_CONTROLLER_ENV = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}


class ServeConfig(Config):
    """Which model, where, and how it decodes when a request does not say."""

    model: str | AdaptedModel | tuple[str | AdaptedModel, ...] = ""
    """A model folder, or models:/NAME@ALIAS; empty = the model shipped with the package. A list, or the option given
    several times: that many models behind one endpoint. An alias is followed: when it moves, weights are swapped. In YAML
    also {model, adapter, name}: a model with a LoRA adapter merged into it."""
    alias_poll_s: float = Field(default=5.0, gt=0.0)
    """Seconds between two looks at an alias."""
    tracking_uri: str = ""
    """MLflow store that a models:/ address is looked up in; empty = MLFLOW_TRACKING_URI, else the demo's."""
    name: str = ""
    """What clients pass as `model`; empty = the folder's or the registered model's name. Not for several models."""
    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs `keys`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 = any free one."""
    front: Literal["proxy", "replicas"] = "proxy"
    """Who answers HTTP: Ray Serve's proxy, which reaches replicas on other machines too, asks the less busy one and asks
    another when one has died; or the replicas themselves, all on the same port of this machine, one process less on the way."""
    address: str = ""
    """host:port of a running Ray cluster whose nodes take the replicas; empty = a Ray of its own on this machine."""
    num_replicas: int = Field(default=1, ge=1)
    """Engines, each in a process of its own."""
    scaling: ScalingConfig = ScalingConfig()
    """As many replicas as the work left asks for, in place of `num_replicas`."""
    routing: Literal["auto", "requests", "load", "prefix"] = "auto"
    """Which replica a request goes to: of two, the one with fewer requests, or less work left, or the one that has seen
    the prompt's beginning unless it has much more to do; auto = prefix where `scaling` is on, else requests."""
    cpus_per_replica: float = Field(default=1.0, gt=0.0)
    """Logical CPUs of each replica, and of each of its other ranks; torch uses as many threads, at least one."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Processes that share each replica's model: each holds its part of the heads and inner columns, and of the cache.
    Must divide the model's key and value heads and its intermediate size."""
    ranks_on: Literal["one_node", "any_node"] = "one_node"
    """Where the ranks of a replica may be: they exchange twice a layer, so only a fast network makes up for two nodes."""
    rank_deadline_s: float = Field(default=60.0, gt=0.0)
    """A rank that has not answered within it is lost, and its replica is replaced."""
    max_sequences: int = Field(default=64, ge=1)
    """Requests that one engine denoises together; more wait."""
    cache_gib: float | None = Field(default=None, gt=0.0)
    """Memory for cached keys and values of each replica, GiB; null = what its sequences can use, at most half of what
    is free. With less, the youngest requests give way and recompute."""
    dtype: ComputeDtype = "saved"
    """Type to compute in; saved = as the checkpoint has it."""
    max_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer at most when the request does not say."""
    policy: DecodePolicy = DecodePolicy()
    """Decode policy of requests that do not say; its seed is never used, each request has its own."""
    keys: Path | None = None
    """File of API keys that requests must show one of (`fewstep key NAME` makes it); null = nobody is asked."""
    limits: LimitsConfig = LimitsConfig()
    """What a replica takes on, and how long a request may take."""
    log: LogConfig = LogConfig()
    """Where requests are logged, one line of JSON each."""
    trace_endpoint: str = ""
    """OTLP address for OpenTelemetry spans, such as http://127.0.0.1:4318/v1/traces; empty = none."""
    drain_seconds: float = Field(default=30.0, gt=0.0)
    """After SIGTERM: how long accepted requests may take to finish while new ones get 503."""

    @property
    def cache_bytes(self) -> int | None:
        """`cache_gib` in bytes."""
        return None if self.cache_gib is None else int(self.cache_gib * 2**30)

    @model_validator(mode="after")
    def _front_reaches_every_replica(self) -> ServeConfig:
        if self.address and self.front == "replicas":
            raise ValueError("front=replicas is for one machine; with address= leave it at proxy")
        return self

    @model_validator(mode="after")
    def _scaling_has_a_router(self) -> ServeConfig:
        if self.scaling.on and self.num_replicas != 1:
            raise ValueError(
                "num_replicas and scaling.max_replicas exclude each other; leave num_replicas out"
            )
        if self.front == "replicas" and self.scaling.on:
            raise ValueError(
                "scaling.max_replicas needs front=proxy: with front=replicas the kernel deals connections"
            )
        if self.front == "replicas" and self.routing not in ("auto", "requests"):
            raise ValueError(
                f"routing={self.routing} needs front=proxy: with front=replicas the kernel deals connections"
            )
        return self

    @property
    def least_replicas(self) -> int:
        """Replicas that there are without load; `most_replicas` under any."""
        return self.scaling.min_replicas if self.scaling.on else self.num_replicas

    @property
    def most_replicas(self) -> int:
        return self.scaling.max_replicas if self.scaling.on else self.num_replicas

    @property
    def chosen_routing(self) -> Routing:
        """`routing`, decided."""
        if self.routing == "auto":
            return "prefix" if self.scaling.on else "requests"
        return self.routing


@dataclass(frozen=True)
class ServedEndpoint:
    """A server that is up. `url` is the root, OpenAI clients want `base_url`; `model` is the first one's name."""

    url: str
    model: str

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


def run(config: ServeConfig) -> None:
    """Serves until Ctrl-C, or until SIGTERM and the end of the requests accepted before it.

    Raises:
        UserError: the model, the port or the CPUs are not there; nothing was started.
        ActorDied: Ray or the HTTP proxy is gone for good.
    """
    with serve_model(config) as endpoint, ending() as stop:
        print(f"serving {endpoint.model} at {endpoint.base_url}  (Ctrl-C ends it)", flush=True)
        watch(endpoint, stop)
        left = drain(config.drain_seconds)
        print("drained" if not left else f"ending with {left} requests unfinished", flush=True)


@contextmanager
def serve_model(config: ServeConfig) -> Iterator[ServedEndpoint]:
    """A healthy server for the length of a `with` block.

    Inside an open Ray session it is a guest of that session; otherwise a session of its own starts and ends
    with it.

    Raises:
        UserError: the model, the port or the CPUs are not there; nothing was started.
        ActorDied: Ray Serve or a replica did not come up.
    """
    port = free_port(config.host, config.port)
    sources = checked_sources(config, config.host)
    # Ray starts only now: everything that can be known without it has been checked.
    with ExitStack() as stack:
        _enter_session(stack, config)
        endpoint = ServedEndpoint(_url(config.host, port), sources[0].name)
        stack.callback(_shut_down)
        _start(config, sources, port)
        _wait_ready(endpoint)
        yield endpoint


def checked_sources(config: ServeConfig, host: str) -> tuple[ModelSource, ...]:
    """The models to serve at an address, after everything that can be known without Ray.

    Raises:
        UserError: nobody would be asked for a key there, or a model, the file of keys or a package is missing.
    """
    check_access(host, config.keys)
    if config.trace_endpoint:
        require_tracing()
    sources = model_sources(config.model, config.name, config.tracking_uri)
    digest = functools.cache(weights_digest)  # a model under several adapters is read once
    for source in sources:
        check_sharding(source, config.tensor_parallel)
        check_model(source, digest)
    return sources


def watch(endpoint: ServedEndpoint, stop: threading.Event | None = None) -> None:
    """Blocks while the server can be reached and `stop` is not set; a signal ends it with its own exception.

    Raises:
        ActorDied: nothing has answered for some time.
    """
    from ray import serve
    from ray.exceptions import RayError

    stop = stop or threading.Event()
    while not stop.wait(_WATCH_S):
        try:
            serve.status()
        except (RayError, serve.exceptions.RayServeException, ConnectionError) as error:
            raise ActorDied(f"the server at {endpoint.url}", f"{error}") from error


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _enter_session(stack: ExitStack, config: ServeConfig) -> None:
    import ray

    from fewstep.actors.placement import free_nodes
    from fewstep.cluster.session import ray_session, require_resources

    need = {"CPU": config.least_replicas * config.tensor_parallel * config.cpus_per_replica}
    if ray.is_initialized():
        require_resources(need)
        require_places(config, free_nodes())
        return
    if config.address:
        stack.enter_context(ray_session(address=config.address, need=need))
        require_places(config, free_nodes())
        return
    # Logical CPUs: two replicas of one CPU may share a core, so the session is never smaller than the need.
    most = config.most_replicas * config.tensor_parallel * config.cpus_per_replica
    cpus = max(math.ceil(most), len(os.sched_getaffinity(0)))
    stack.enter_context(ray_session(cpus, need=need))


def require_places(config: ServeConfig, nodes: Sequence[Node]) -> None:
    """Refuse what the nodes hold in total and not one by one: Serve would wait for it forever, without a word.

    Raises:
        ResourceError: says what each node has free.
    """
    count, ranks, cpus = config.least_replicas, config.tensor_parallel, config.cpus_per_replica
    need = Need("replica", count, ranks * cpus)
    if config.ranks_on == "any_node":
        need = Need("rank", count * ranks, cpus)
    try:
        place(nodes, [need])
    except ResourceError as error:
        fix = "lower num_replicas, tensor_parallel or cpus_per_replica, or add nodes"
        if ranks > 1 and config.ranks_on == "one_node":
            fix += "; ranks_on=any_node lets a replica's ranks be on several"
        raise ResourceError("replicas", error.got, error.allowed, fix) from error


def serving_options(config: ServeConfig, listen: tuple[str, int] | None = None) -> dict[str, Any]:
    """Keyword arguments of `actors.serving.replica.application`."""
    from fewstep.actors.serving.desk import DeskOptions
    from fewstep.actors.serving.engine_source import EngineOptions

    # A worker's working directory is its own affair.
    keys = config.keys.resolve() if config.keys is not None else None
    log = LogConfig(file=config.log.file.resolve() if config.log.file else None, prompts=config.log.prompts)
    return {
        "policy": config.policy,
        "max_tokens": config.max_tokens,
        "engine": EngineOptions(
            config.max_sequences,
            config.dtype,
            config.cache_bytes,
            config.tensor_parallel,
            config.ranks_on == "one_node",
            config.rank_deadline_s,
        ),
        "num_replicas": config.num_replicas,
        "num_cpus": config.cpus_per_replica,
        "alias_poll_s": config.alias_poll_s,
        "desk": DeskOptions(config.limits, log, keys, config.trace_endpoint),
        "drain_s": config.drain_seconds,
        "listen": listen,
        "scaling": config.scaling,
        "routing": config.chosen_routing,
    }


def proxy_environment(config: ServeConfig) -> dict[str, str]:
    """Variables of Serve's proxies: what shows their router the prompt's beginning."""
    if config.chosen_routing != "prefix":
        return {}
    hook = "fewstep.actors.serving.prefix_routing.proxy_middlewares"
    return {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": hook}


def _proxies(config: ServeConfig) -> str:
    """On which nodes Serve's proxy listens: of a cluster on every one, this one included, wherever its head is."""
    if config.front == "replicas":
        return "Disabled"
    return "EveryNode" if config.address else "HeadOnly"


def _start(config: ServeConfig, sources: Sequence[ModelSource], port: int) -> None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from fewstep.actors.serving.replica import APPLICATION, application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    listen = (config.host, port) if config.front == "replicas" else None
    app = application(sources, **serving_options(config, listen))
    try:
        serve.start(
            proxy_location=_proxies(config),
            http_options=HTTPOptions(host=config.host, port=port),
            logging_config=LoggingConfig(log_level="WARNING"),
            # The proxies are the controller's actors, and have what it has.
            controller_options={"runtime_env": {"env_vars": _CONTROLLER_ENV | proxy_environment(config)}},
        )
        serve.run(app, name=APPLICATION, route_prefix="/")
    except (RuntimeError, TimeoutError, RayError) as error:
        raise ActorDied("Ray Serve", f"it did not start: {error}") from error


def _wait_ready(endpoint: ServedEndpoint) -> None:
    deadline, last = time.monotonic() + _READY_S, "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{endpoint.url}/health", timeout=5.0) as response:
                health = json.load(response)
            if health.get("model") == endpoint.model:
                return
            last = f"someone else's answer: {health}"
        except (OSError, ValueError) as error:
            last = str(error)
        time.sleep(0.2)
    raise ActorDied(f"the server at {endpoint.url}", f"not ready after {_READY_S:.0f} s: {last}")


def _shut_down() -> None:
    """End Serve and forget it, so that the same process can start it again."""
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    # `serve.shutdown()` alone waits inside the controller until that is killed, and Ray tells the terminal of a
    # failed task with "infinite retries". Asked without waiting, the controller ends just the same.
    deadline = time.monotonic() + _SHUTDOWN_S
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=_SHUTDOWN_S)
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.1)
    except (ValueError, ray.exceptions.RayError):
        logger.debug("Serve's controller is gone")
    serve.shutdown()  # type: ignore[no-untyped-call]
