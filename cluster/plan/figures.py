"""The plan's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.cluster.plan.bottleneck import Scale
from fewstep.cluster.plan.refine_ratio import Ratio
from fewstep.cluster.plan.sizing import Size
from fewstep.pipelines.figures import AFTER, BEFORE, FAINT, INK, new_figure, save_figure, style_axes


def draw_cost(path: Path, sizes: Sequence[Size]) -> None:
    """USD for a million tokens of every device and policy that meets the demand, cheapest at the top."""
    met = sorted((size for size in sizes if size.met), key=lambda size: -size.price_per_million)
    figure = new_figure(8.0, 1.4 + 0.3 * max(1, len(met)))
    axes = figure.add_subplot()
    style_axes(axes, "Price of a million committed tokens (device prices are assumptions)")
    labels = [f"{size.num_devices} x {size.device}, {size.profile.label()}" for size in met]
    bars = axes.barh(labels, [size.price_per_million for size in met], color=AFTER)
    axes.bar_label(bars, [f"{size.price_per_million:.3f}" for size in met], padding=3, color=INK, fontsize=8)
    axes.set_xlabel("USD")
    axes.margins(x=0.12)
    save_figure(figure, path)


def draw_ratio(path: Path, ratio: Ratio) -> None:
    """Seconds of a training step against how many devices train."""
    figure = new_figure(8.0, 4.5)
    axes = figure.add_subplot()
    style_axes(
        axes, f"A refinement step on {ratio.best.trainer_devices + ratio.best.replica_devices} devices"
    )
    trainers = [split.trainer_devices for split in ratio.splits]
    for name, colour, values in (
        ("rollouts", BEFORE, [split.rollout_s for split in ratio.splits]),
        ("update", "#15803d", [split.update_s for split in ratio.splits]),
        ("step, overlapped", AFTER, [split.step_s for split in ratio.splits]),
        ("step, on policy", "#7c3aed", [split.on_policy_s for split in ratio.splits]),
    ):
        axes.plot(trainers, values, marker="o", markersize=4, label=name, color=colour)
    axes.axhline(
        ratio.colocated_s, color=INK, linestyle=(0, (5, 3)), linewidth=0.9, label="colocated, on policy"
    )
    axes.axvline(ratio.best.trainer_devices, color=FAINT)
    axes.set_yscale("log")
    axes.set_xlabel("devices that train; the others generate")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)
    save_figure(figure, path)


def draw_scale(path: Path, scales: Sequence[Scale]) -> None:
    """Left: seconds of a weight push against replicas. Right: the controller's share of its one thread."""
    figure = new_figure(10.0, 4.2)
    left, right = figure.subplots(1, 2)
    style_axes(left, "Weights on every node")
    counts = [scale.num_replicas for scale in scales]
    for name, colour, values in (
        ("one uplink", BEFORE, [scale.flat_s for scale in scales]),
        ("holders double", "#15803d", [scale.holders_s for scale in scales]),
        ("tree", AFTER, [scale.tree_s for scale in scales]),
        ("whole push by the tree", "#7c3aed", [scale.push_s for scale in scales]),
    ):
        left.plot(counts, values, marker="o", markersize=4, label=name, color=colour)
    left.set_yscale("log")
    left.set_ylabel("seconds")
    left.legend(frameon=False)
    style_axes(right, "The controller's thread")
    right.plot(counts, [scale.controller_share for scale in scales], marker="o", markersize=4, color=AFTER)
    right.axhline(1.0, color=INK, linestyle=(0, (5, 3)), linewidth=0.9)
    right.set_yscale("log")
    right.set_ylabel("share in use; above 1 it falls behind")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("replicas")
    save_figure(figure, path)
