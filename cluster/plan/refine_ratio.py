"""How a refinement job's devices are best dealt out between replicas and trainer ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.cluster.plan.answers import ProfiledAnswers
from fewstep.cluster.plan.devices import Device
from fewstep.cluster.plan.fleet_model import FleetModel, FleetSpec, burst_jobs
from fewstep.cluster.plan.push import push_of
from fewstep.cluster.plan.settings import PlanConfig, PolicyProfile
from fewstep.cluster.plan.sizing import num_pages
from fewstep.cluster.plan.step_cost import Roofline

_POINTS = 9


@dataclass(frozen=True)
class Split:
    """One way to deal the devices out; seconds are of one training step.

    Attributes:
        step_s: rollouts of the next step overlap with the update of this one (one step off policy), so the slower counts;
            then verdicts of the last answers and the push.
        on_policy_s: nothing overlaps.
    """

    trainer_devices: int
    replica_devices: int
    rollout_s: float
    update_s: float
    push_s: float
    step_s: float
    on_policy_s: float


@dataclass(frozen=True)
class Ratio:
    """The splits that were tried, the best of them, and the same devices all taking turns (colocated)."""

    splits: tuple[Split, ...]
    best: Split
    colocated_s: float
    min_trainer_devices: int


def best_ratio(config: PlanConfig, device: Device, profile: PolicyProfile) -> Ratio | None:
    """Tries splits of `config.refine.num_devices`; None when the model's optimiser or weights do not fit any of them."""
    refine, ranks = config.refine, config.fleet.tensor_parallel
    state = config.model.parameters * refine.bytes_per_trained_parameter
    # As much again for activations and gathered layers.
    least = max(1, math.ceil(1.5 * state / (device.memory_bytes * config.fleet.memory_share)))
    pages = num_pages(config, device, profile.block_size)
    most = refine.num_devices - ranks
    if least > most or not pages:
        return None
    tried = sorted({round(least + (most - least) * index / (_POINTS - 1)) for index in range(_POINTS)})
    splits = tuple(_split(config, device, profile, pages, trainers) for trainers in tried)
    best = min(splits, key=lambda split: split.step_s)
    replicas = refine.num_devices // ranks
    alone = (
        rollout_s(config, device, profile, pages, replicas)
        + update_s(config, device, refine.num_devices)
        + push_of(config, replicas).seconds
        + refine.verify_s
    )
    return Ratio(splits, best, alone, least)


def _split(config: PlanConfig, device: Device, profile: PolicyProfile, pages: int, trainers: int) -> Split:
    refine = config.refine
    replicas = (refine.num_devices - trainers) // config.fleet.tensor_parallel
    rollouts = rollout_s(config, device, profile, pages, replicas)
    update, push = update_s(config, device, trainers), push_of(config, replicas).seconds
    return Split(
        trainers,
        replicas * config.fleet.tensor_parallel,
        rollouts,
        update,
        push,
        max(rollouts, update) + push + refine.verify_s,
        rollouts + update + push + refine.verify_s,
    )


def rollout_s(
    config: PlanConfig, device: Device, profile: PolicyProfile, pages: int, num_replicas: int
) -> float:
    """Seconds until the last of a step's rollouts is there; the largest share of any replica, long answers included."""
    share = math.ceil(config.refine.rollouts_per_step / num_replicas)
    spec = FleetSpec(Roofline(device, config.model, config.fleet), 1, config.fleet.max_sequences, pages)
    source = ProfiledAnswers(config.workload, profile)
    return FleetModel(spec, config.seed).simulate(burst_jobs(source, share, config.seed)).seconds


def update_s(config: PlanConfig, device: Device, num_devices: int) -> float:
    """Seconds of one update: 6 FLOP a parameter and row; each state carries its noisy and its clean rows."""
    workload, refine = config.workload, config.refine
    rows = workload.prompt_tokens + workload.answer_tokens * (1.0 + refine.states_per_rollout)
    flops = 6.0 * config.model.active_parameters * rows * refine.rollouts_per_step
    return flops / (num_devices * device.flops_per_s * refine.trainer_share)
