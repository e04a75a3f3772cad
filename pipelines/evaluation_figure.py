"""The figure of an evaluation: quality against cost, a row of charts a benchmark, a curve a model.

Three costs beside each other: forwards per answer and tokens per forward, which any machine gives, and tokens per second,
which is this one's. Dominated policies are hollow; bars are the intervals of pass@1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.pipelines.evaluation_settings import BASELINE_MARK
from fewstep.pipelines.evaluation_summary import FrontierSummary, PolicySummary
from fewstep.pipelines.figures import AFTER, BEFORE, INK, new_figure, policy_label, save_figure, style_axes
from fewstep.pipelines.repair import RepairSummary

_COSTS: tuple[tuple[str, Callable[[PolicySummary], float], bool], ...] = (
    ("forwards per answer (fewer is faster)", lambda one: one.point.forwards_per_answer, True),
    ("tokens per forward", lambda one: one.point.tokens_per_forward, False),
    ("tokens per second", lambda one: one.point.tokens_per_second, False),
)
_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)


def draw_evaluation(
    path: Path,
    frontiers: Mapping[str, Mapping[str, FrontierSummary]],
    repairs: Mapping[str, Sequence[RepairSummary]],
) -> None:
    """One PNG for all of it.

    Args:
        frontiers: benchmark to model's name to its frontier.
        repairs: model's name to its repair; empty = not measured.
    """
    rows = len(frontiers) + (1 if repairs else 0)
    figure = new_figure(13.5, 3.9 * rows)
    grid = figure.add_gridspec(rows, len(_COSTS))
    for row, (benchmark, models) in enumerate(frontiers.items()):
        for column, (label, cost, log) in enumerate(_COSTS):
            axes = figure.add_subplot(grid[row, column])
            style_axes(axes, _title(benchmark, models) if column == 0 else "")
            _draw_models(axes, models, cost, labels=column == 0)
            _cost_axis(axes, label, log=log)
            if column == 0:
                axes.set_ylabel("pass@1, 95 % interval", fontsize=9.5)
                axes.legend(frameon=False, fontsize=8, loc="best")
    if repairs:
        _draw_repair(figure.add_subplot(grid[rows - 1, :2]), repairs)
    save_figure(figure, path)


def _title(benchmark: str, models: Mapping[str, FrontierSummary]) -> str:
    count = next(iter(models.values())).points[0].num_tasks
    areas = ", ".join(f"{frontier.aup:.0f}" for frontier in models.values())
    return f"{benchmark}, {count} tasks; AUP {areas}"


def _colours(names: Sequence[str]) -> tuple[str, ...]:
    """One a model; the baseline, which stands last, in the ink's."""
    models = [name for name in names if not name.endswith(BASELINE_MARK)]
    return ((AFTER,) if len(models) == 1 else (BEFORE, AFTER)) + (INK,) * (len(names) - len(models))


def _draw_models(
    axes: Any, models: Mapping[str, FrontierSummary], cost: Callable[[PolicySummary], float], *, labels: bool
) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    for (name, frontier), colour in zip(models.items(), _colours(list(models)), strict=True):
        kept = sorted((one for one in frontier.policies if not one.dominated), key=cost)
        axes.plot(
            [cost(one) for one in kept],
            [one.point.pass_at_1 for one in kept],
            color=colour,
            linewidth=1.5,
            label=name,
        )
        for one in frontier.policies:
            _draw_point(axes, one, cost(one), colour)
            if labels and not one.dominated:
                axes.annotate(
                    policy_label(one.point.policy), xy=(cost(one), one.point.pass_at_1), xytext=(0, 7),
                    textcoords="offset points", ha="center", fontsize=7.5, color=colour, path_effects=halo,
                    zorder=5,
                )  # fmt: skip
    bar = next(iter(models.values())).bar
    axes.axhline(
        bar,
        color=INK,
        linewidth=0.8,
        linestyle=(0, (5, 3)),
        zorder=1,
        label=f"bar: {bar:.3f}" if labels else None,
    )


def _draw_point(axes: Any, one: PolicySummary, x: float, colour: str) -> None:
    passed = one.passes[1]
    axes.errorbar(
        x, passed.value, yerr=[[passed.value - passed.low], [passed.high - passed.value]], color=colour,
        ecolor=colour + "66", elinewidth=1.0, marker="s" if one.point.policy.kind == "static" else "o", markersize=5,
        markerfacecolor="white" if one.dominated else colour, zorder=3,
    )  # fmt: skip


def _cost_axis(axes: Any, label: str, *, log: bool) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xlabel(label, fontsize=9.5)
    if not log:
        axes.set_xlim(left=0)
        return
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_repair(axes: Any, repairs: Mapping[str, Sequence[RepairSummary]]) -> None:
    first = next(iter(repairs.values()))
    style_axes(axes, f"repair of corrupted answers, {len(first[0].per_task)} tasks")
    for (name, summaries), colour in zip(repairs.items(), _colours(list(repairs)), strict=True):
        edits = [one for one in summaries if one.threshold is not None]
        xs = [one.threshold for one in edits]
        ys = [one.passed.value for one in edits]
        errors = [
            [one.passed.value - one.passed.low for one in edits],
            [one.passed.high - one.passed.value for one in edits],
        ]
        axes.errorbar(
            xs,
            ys,
            yerr=errors,
            color=colour,
            ecolor=colour + "66",
            marker="o",
            markersize=5,
            linewidth=1.5,
            label=f"{name}: pass@1",
        )
        axes.plot(
            xs,
            [one.restored for one in edits],
            color=colour,
            linewidth=1.0,
            linestyle=":",
            label=f"{name}: wrong tokens restored",
        )
    axes.axhline(first[0].passed.value, color=INK, linewidth=0.8, linestyle=(0, (5, 3)), label="unrepaired")
    axes.set_xlabel("edit threshold (confidence a replacement must have)", fontsize=9.5)
    axes.set_ylabel("share", fontsize=9.5)
    axes.legend(frameon=False, fontsize=8, loc="best")
