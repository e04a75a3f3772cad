"""The plan as data and as a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fewstep.cluster.plan.bottleneck import Scale
from fewstep.cluster.plan.devices import DEVICES
from fewstep.cluster.plan.refine_ratio import Ratio
from fewstep.cluster.plan.settings import PlanConfig
from fewstep.cluster.plan.sizing import Size, cheapest


@dataclass(frozen=True)
class Plan:
    """Every answer; `ratio` is None where a refinement of this model does not fit its devices."""

    config: PlanConfig
    sizes: tuple[Size, ...]
    ratio: Ratio | None
    ratio_device: str
    scales: tuple[Scale, ...]

    def as_data(self) -> dict[str, Any]:
        """For report.json."""
        best = cheapest(list(self.sizes))
        return {
            "settings": self.config.model_dump(mode="json", exclude={"out"}),
            "devices": {name: asdict(DEVICES[name]) for name in self.config.fleet.devices},
            "cheapest": _size_data(best) if best else None,
            "sizes": [_size_data(size) for size in self.sizes],
            "refine": {"device": self.ratio_device, **asdict(self.ratio)} if self.ratio else None,
            "scales": [asdict(scale) for scale in self.scales],
        }

    def as_markdown(self) -> str:
        """For report.md."""
        parts = [
            _demand(self),
            _sizes_table(self),
            _ratio_table(self),
            _scale_table(self),
            _method(self.config),
        ]
        return "\n\n".join(parts) + "\n"


def _size_data(size: Size) -> dict[str, Any]:
    return {**asdict(size), "profile": size.profile.model_dump()}


def _demand(plan: Plan) -> str:
    workload, model = plan.config.workload, plan.config.model
    best = cheapest(list(plan.sizes))
    asked = (
        f"# Plan for {model.name}\n\n"
        f"Asked: {workload.tokens_per_s:,.0f} tokens/s, 95 of 100 answers within {workload.p95_s:g} s; prompts of "
        f"{workload.prompt_tokens} tokens ({workload.shared_prompt_tokens} of them cached), answers of "
        f"{workload.answer_tokens}."
    )
    if best is None:
        return asked + "\n\n**Not to be met** with these devices and policies; the table says why."
    return (
        asked
        + f"\n\n**{best.num_devices} x {best.device}** at {best.profile.label()}: p95 {best.p95_s:.2f} s, "
        + f"USD {best.price_per_million:.3f} for a million tokens."
    )


def _sizes_table(plan: Plan) -> str:
    lines = [
        "## Devices and policy",
        "",
        "| device | policy | quality | tokens/s a replica, full | at the bound | devices | p95, s | alone, s | USD / M tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ranked = sorted(plan.sizes, key=lambda size: (not size.met, size.price_per_million))
    for size in ranked:
        head = f"| {size.device} | {size.profile.label()} | {size.profile.quality:.3f} |"
        if not size.met:
            lines.append(f"{head} {size.capacity:,.0f} | {size.reason} | | | {size.p95_alone_s:.2f} | |")
            continue
        lines.append(
            f"{head} {size.capacity:,.0f} | {size.load:,.0f} | {size.num_devices} | {size.p95_s:.2f} | "
            f"{size.p95_alone_s:.2f} | {size.price_per_million:.3f} |"
        )
    return "\n".join(lines)


def _ratio_table(plan: Plan) -> str:
    refine = plan.config.refine
    title = f"## Trainers and replicas of a refinement\n\n{refine.num_devices} x {plan.ratio_device}, "
    if plan.ratio is None:
        return title + "on which weights and optimiser state of this model do not fit."
    best = plan.ratio.best
    lines = [
        title
        + f"{refine.rollouts_per_step} rollouts a step. Best: **{best.trainer_devices} train, {best.replica_devices} generate** "
        + f"({best.step_s:.1f} s a step, one step off policy); all taking turns: {plan.ratio.colocated_s:.1f} s, on policy.",
        "",
        "| train | generate | rollouts, s | update, s | push, s | step, overlapped | step, on policy |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {s.trainer_devices} | {s.replica_devices} | {s.rollout_s:.1f} | {s.update_s:.1f} | {s.push_s:.1f} | "
        f"{s.step_s:.1f} | {s.on_policy_s:.1f} |"
        for s in plan.ratio.splits
    ]
    return "\n".join(lines)


def _scale_table(plan: Plan) -> str:
    lines = [
        "## Where a large fleet binds",
        "",
        (
            "| replicas | nodes | controller's share | calls of a push, s | put, s | one uplink, s | holders double, s | tree, s "
            "| hops | push, s | binds |"
        ),
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {s.num_replicas} | {s.num_nodes} | {s.controller_share:.3f} | {s.calls_s:.2f} | {s.put_s:.1f} | {s.flat_s:.1f} | "
        f"{s.holders_s:.1f} | {s.tree_s:.1f} | {s.tree_depth} | {s.push_s:.1f} | {s.binds} |"
        for s in plan.scales
    ]
    return "\n".join(lines)


def _method(config: PlanConfig) -> str:
    fleet = config.fleet
    return (
        "## What this rests on\n\n"
        f"Steps are priced by a roofline: {fleet.compute_share:g} of peak arithmetic, {fleet.bandwidth_share:g} of peak "
        f"bandwidth, {fleet.overhead_s * 1e3:g} ms of host time a step; peaks are data sheets', prices assumptions. Requests "
        "are scheduled by the engine's own rules, arrive at random (Poisson), and go to the less loaded of two replicas. "
        f"A replica dies every {fleet.mean_hours_between_failures:g} hours in the mean and is back after {fleet.restart_s:g} s. "
        "Blocks take a number of forwards drawn around their mean; what a real text does may be less even. "
        "No device was measured for this page."
    )
