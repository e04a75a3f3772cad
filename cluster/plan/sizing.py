"""How many devices a demand takes: the most that one replica carries within the latency bound, then a fleet to confirm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.cluster.plan.answers import ProfiledAnswers
from fewstep.cluster.plan.devices import DEVICES, Device
from fewstep.cluster.plan.fleet_model import FleetModel, FleetRun, FleetSpec, burst_jobs, poisson_jobs
from fewstep.cluster.plan.push import load_s
from fewstep.cluster.plan.settings import PlanConfig, PolicyProfile
from fewstep.cluster.plan.step_cost import Roofline

_BISECTIONS = 6
_MAX_LOAD = (
    0.95  # of what a replica does when it is never idle; close to 1 a queue takes hours to show its length
)
_WARM_UP = 0.25  # of the answers, which met a fleet that was still filling up


@dataclass(frozen=True)
class Size:
    """The answer for one device and one policy.

    Attributes:
        capacity: committed tokens per second of one replica that always has a full batch.
        load: committed tokens per second of one replica at which p95 is within the bound; 0 = at none.
        p95_s: of the confirming fleet; p95_alone_s: of a request that has a replica to itself.
        num_replicas, num_devices: for the demand; 0 = it cannot be met.
        price_per_million: USD for a million committed tokens at that size.
        reason: why it cannot be met; empty when it can.
    """

    device: str
    profile: PolicyProfile
    capacity: float = 0.0
    load: float = 0.0
    p95_s: float = 0.0
    p95_alone_s: float = 0.0
    num_replicas: int = 0
    num_devices: int = 0
    price_per_million: float = 0.0
    mean_rows: float = 0.0
    restarted: int = 0
    reason: str = ""

    @property
    def met(self) -> bool:
        return not self.reason


def num_pages(config: PlanConfig, device: Device, block_size: int) -> int:
    """Blocks of keys and values that fit beside the weights of one replica; 0 = not even the weights fit."""
    room = device.memory_bytes * config.fleet.memory_share * config.fleet.tensor_parallel
    room -= config.model.weight_bytes
    return max(0, int(room / (config.model.kv_bytes_per_token * block_size)))


def size_for(config: PlanConfig, device: Device, profile: PolicyProfile) -> Size:
    """Devices of one kind under one policy for `config.workload`."""
    pages = num_pages(config, device, profile.block_size)
    workload = config.workload
    longest = workload.prompt_tokens + 4 * workload.answer_tokens
    if pages * profile.block_size < longest:
        need = config.model.weight_bytes / 1e9
        return Size(
            device.name, profile, reason=f"the weights ({need:.0f} GB) leave no room for a request's pages"
        )
    source = ProfiledAnswers(workload, profile)
    cost = Roofline(device, config.model, config.fleet)
    spec = FleetSpec(cost, 1, config.fleet.max_sequences, pages)
    alone = FleetModel(spec, config.seed).simulate(poisson_jobs(source, 1e-6, 50, config.seed))
    full = FleetModel(spec, config.seed).simulate(
        burst_jobs(source, max(config.num_requests, 6 * config.fleet.max_sequences), config.seed)
    )
    capacity = full.steady_tokens_per_s()
    if (best := alone.latency_s(95)) > workload.p95_s:
        reason = f"one request alone takes {best:.2f} s"
        return Size(device.name, profile, capacity, p95_alone_s=best, reason=reason)
    load = _largest_load(config, spec, source, capacity)
    if load == 0.0:
        return Size(device.name, profile, capacity, p95_alone_s=best, reason="p95 is missed at every load")
    return _confirmed(
        config, device, profile, spec, source, Size(device.name, profile, capacity, load, p95_alone_s=best)
    )


def _run_at(config: PlanConfig, spec: FleetSpec, source: ProfiledAnswers, tokens_per_s: float) -> FleetRun:
    count = max(config.num_requests, 6 * config.fleet.max_sequences) * spec.num_replicas
    rate = tokens_per_s / config.workload.answer_tokens
    return FleetModel(spec, config.seed).simulate(poisson_jobs(source, rate, count, config.seed))


def _largest_load(config: PlanConfig, spec: FleetSpec, source: ProfiledAnswers, capacity: float) -> float:
    def holds(share: float) -> bool:
        run = _run_at(config, spec, source, share * capacity)
        return run.latency_s(95, _WARM_UP) <= config.workload.p95_s

    if holds(_MAX_LOAD):
        return _MAX_LOAD * capacity
    low, high = 0.0, _MAX_LOAD
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low * capacity


def _confirmed(
    config: PlanConfig,
    device: Device,
    profile: PolicyProfile,
    spec: FleetSpec,
    source: ProfiledAnswers,
    found: Size,
) -> Size:
    """The fleet of that size with its failures and pushes; one replica more until the bound holds."""
    fleet, wanted = config.fleet, config.workload.tokens_per_s
    num_replicas = max(1, math.ceil(wanted / found.load))
    for _ in range(4):
        simulated = min(num_replicas, config.max_simulated_replicas)
        whole = FleetSpec(
            spec.cost,
            simulated,
            spec.max_sequences,
            spec.num_pages,
            mean_s_between_failures=fleet.mean_hours_between_failures * 3600,
            restart_s=fleet.restart_s,
            push_every_s=fleet.push_every_s,
            push_s=load_s(config),
        )
        run = _run_at(config, whole, source, wanted * simulated / num_replicas)
        if run.latency_s(95, _WARM_UP) <= config.workload.p95_s:
            break
        num_replicas = math.ceil(num_replicas * 1.1)
    else:
        reason = f"with failures and pushes p95 stays at {run.latency_s(95, _WARM_UP):.2f} s"
        return Size(
            device.name, profile, found.capacity, found.load, p95_alone_s=found.p95_alone_s, reason=reason
        )
    devices = num_replicas * fleet.tensor_parallel
    price = fleet.price_per_hour or device.price_per_hour
    return Size(
        device=device.name,
        profile=profile,
        capacity=found.capacity,
        load=found.load,
        p95_s=run.latency_s(95, _WARM_UP),
        p95_alone_s=found.p95_alone_s,
        num_replicas=num_replicas,
        num_devices=devices,
        price_per_million=devices * price / 3600.0 / wanted * 1e6,
        mean_rows=run.rows / run.forwards,
        restarted=run.restarted,
    )


def cheapest(sizes: list[Size]) -> Size | None:
    """The met size with the lowest price for a token; None when no size meets the demand."""
    met = [size for size in sizes if size.met]
    return min(met, key=lambda size: (size.price_per_million, size.num_devices)) if met else None


def all_sizes(config: PlanConfig) -> list[tuple[Device, PolicyProfile]]:
    """What there is to try: every device with every policy that is good enough."""
    return [
        (DEVICES[name], profile)
        for name in config.fleet.devices
        for profile in config.profiles
        if profile.quality >= config.workload.min_quality
    ]
