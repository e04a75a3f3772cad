"""Two runs as one figure: their frontiers over each other, and where their time went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.pipelines.figures import AFTER, BEFORE, PointLabels, new_figure, save_figure, style_axes
from fewstep.pipelines.frontier import standard_error
from fewstep.pipelines.promotion import Mark, undominated
from fewstep.pipelines.run_record import RunRecord
from fewstep.platform.records import FrontierPoint

_COLOURS = (BEFORE, AFTER, "#15803d", "#c2410c", "#7c3aed", "#0e7490")
_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)


def draw_comparison(path: Path, runs: Mapping[str, RunRecord]) -> None:
    """The frontier of the model each run ended with; below, seconds by stage where the runs know them.

    Args:
        runs: name to run; each has a frontier.
    """
    bills = {name: run.report["cost"]["seconds"] for name, run in runs.items() if "cost" in run.report}
    figure = new_figure(8.0, 4.6 + (0.55 * len(bills) + 1.0 if bills else 0.0))
    ratios = [4.6, 0.55 * len(bills) + 1.0] if bills else [1.0]
    grid = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
    frontiers = figure.add_subplot(grid[0])
    points, labels = _draw_frontiers(frontiers, runs)
    if bills:
        _draw_bills(figure.add_subplot(grid[1]), bills)
    places = PointLabels(figure, frontiers, points)
    for point, colour in labels:
        places.place(point, colour)
    save_figure(figure, path)


def _draw_frontiers(
    axes: Any, runs: Mapping[str, RunRecord]
) -> tuple[list[FrontierPoint], list[tuple[FrontierPoint, str]]]:
    """Returns all points, and those to be labelled with their colours: labels are placed once the layout stands."""
    from matplotlib.ticker import NullFormatter, NullLocator

    style_axes(axes, "Speed-quality frontier; hollow: dominated by the same run's other policies")
    everything: list[FrontierPoint] = []
    labels: list[tuple[FrontierPoint, str]] = []
    for (name, run), colour in zip(runs.items(), _COLOURS * (1 + len(runs) // len(_COLOURS)), strict=False):
        points = run.final_frontier()
        everything += points
        best = {mark.label for mark in undominated([_mark(point) for point in points])}
        kept = sorted((p for p in points if p.policy.label() in best), key=lambda p: p.forwards_per_answer)
        rest = [point for point in points if point.policy.label() not in best]
        axes.errorbar(
            [p.forwards_per_answer for p in kept], [p.pass_at_1 for p in kept], yerr=[standard_error(p) for p in kept],
            color=colour, marker="o", markersize=5, linewidth=1.5, elinewidth=0.9, label=f"{name}, {points[0].num_tasks} tasks",
        )  # fmt: skip
        axes.plot(
            [p.forwards_per_answer for p in rest], [p.pass_at_1 for p in rest], "o", markersize=4.5,
            markerfacecolor="none", markeredgecolor=colour + "99",
        )  # fmt: skip
        labels += [(point, colour) for point in kept]
    axes.set_xscale("log")
    forwards = [point.forwards_per_answer for point in everything]
    low, high = min(forwards) / 1.25, max(forwards) * 1.25
    axes.set_xlim(low, high)
    axes.set_xticks(
        [t for t in _TICKS if low <= t <= high], labels=[f"{t:g}" for t in _TICKS if low <= t <= high]
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("forwards per answer (fewer is faster)", fontsize=9.5)
    axes.set_ylabel("pass@1, with standard error", fontsize=9.5)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return everything, labels


def _draw_bills(axes: Any, bills: Mapping[str, Mapping[str, float]]) -> None:
    style_axes(axes, "Seconds by stage")
    stages = list(dict.fromkeys(stage for bill in bills.values() for stage in bill))
    names = list(bills)
    lefts = [0.0] * len(names)
    for stage, colour in zip(
        stages,
        ("#1763b6", "#94a3b8", "#15803d", "#a3a3a3", "#c2410c", "#7c3aed", "#d4d4d8", "#e4e4e7"),
        strict=False,
    ):
        widths = [bills[name].get(stage, 0.0) for name in names]
        axes.barh(range(len(names)), widths, left=lefts, color=colour, height=0.55, label=stage)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_yticks(range(len(names)), labels=names, fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(
        frameon=False, fontsize=7.5, ncols=len(stages), loc="upper center", bbox_to_anchor=(0.5, -0.28)
    )


def _mark(point: Any) -> Mark:
    return Mark(point.policy.label(), point.pass_at_1, point.forwards_per_answer)
