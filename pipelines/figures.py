"""Figures of a run as PNG files: the frontier, curves over training, forwards per answer.

Matplotlib is imported when a figure is drawn, and drawn without pyplot: no display, no state shared between
figures. Files are written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.pipelines.frontier import Speedup, standard_error
from fewstep.platform.artifacts import atomic_file
from fewstep.platform.records import DecodePolicy, FrontierPoint, Trajectory

BEFORE, AFTER = "#8b5e34", "#1763b6"
INK, FAINT = "#24292f", "#d0d7de"
_SERIES = (AFTER, "#c2410c", "#15803d", "#7c3aed", BEFORE, "#0e7490")
_DPI = 160
_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, laid out to fit what is drawn on it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG, whole or not at all. Raises ResourceError when the disk is full."""
    with atomic_file(path) as temporary:
        # No date or version inside: the same data gives the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def draw_frontier(
    path: Path,
    before: Sequence[FrontierPoint],
    after: Sequence[FrontierPoint] = (),
    *,
    speedup: Speedup | None = None,
    bar: float | None = None,
    title: str = "",
) -> None:
    """pass@1 against forwards per answer (log), one curve per model, every threshold labelled.

    Args:
        after: empty = one model only.
        speedup: draws the bar and an arrow between the two points that it compares.
        bar: pass@1 to mark where there is no `speedup`.
    """
    figure = new_figure(8.0, 5.0)
    axes = figure.add_subplot()
    style_axes(axes, title or f"Speed-quality frontier, {before[0].num_tasks} tasks")
    curves = [("before", BEFORE, before), ("after", AFTER, after)] if after else [("model", AFTER, before)]
    for name, colour, points in curves:
        _frontier_curve(axes, name, colour, points)
    everything = [*before, *after]
    _frontier_axes(axes, everything)
    bar = speedup.bar if speedup is not None else bar
    if bar is not None:
        axes.axhline(bar, color=INK, linewidth=0.9, linestyle=(0, (5, 3)), zorder=1, label=f"bar: {bar:.3f}")
    if speedup is not None and speedup.after is not None:
        _arrow(axes, speedup.before, speedup.after, f"{speedup.speedup_forwards:.1f}x fewer")
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    labels = PointLabels(figure, axes, everything)
    for _, colour, points in reversed(curves):
        for point in points:
            labels.place(point, colour)
    save_figure(figure, path)


def style_axes(axes: Any, title: str) -> None:
    """A title at the left, two spines, a faint grid behind the data."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=FAINT)


def _frontier_curve(axes: Any, name: str, colour: str, points: Sequence[FrontierPoint]) -> None:
    thresholds = sorted(
        (point for point in points if point.policy.kind == "threshold"),
        key=lambda point: point.policy.threshold,
    )
    static = [point for point in points if point.policy.kind == "static"]
    for group, marker, line, what in (
        (thresholds, "o", "-", "threshold"),
        (static, "s", "none", "tokens per step"),
    ):
        if group:
            axes.errorbar(
                [point.forwards_per_answer for point in group],
                [point.pass_at_1 for point in group],
                yerr=[standard_error(point) for point in group],
                color=colour, ecolor=colour + "66", elinewidth=1.0, linewidth=1.6, linestyle=line, marker=marker,
                markersize=5.5, zorder=3, label=f"{name}, {what}",
            )  # fmt: skip


def _frontier_axes(axes: Any, points: Sequence[FrontierPoint]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log")
    forwards = [point.forwards_per_answer for point in points]
    low, high = min(forwards) / 1.25, max(forwards) * 1.25
    axes.set_xlim(low, high)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("forwards per answer (fewer is faster)", fontsize=10)
    axes.set_ylabel("pass@1, with standard error", fontsize=10)
    quality = [point.pass_at_1 for point in points]
    margin = 0.08 * (max(quality) - min(quality)) + 0.02
    axes.set_ylim(max(-0.02, min(quality) - margin), min(1.03, max(quality) + margin))


def _arrow(axes: Any, start: FrontierPoint, end: FrontierPoint, text: str) -> None:
    xs = (start.forwards_per_answer, end.forwards_per_answer)
    for point, colour in ((start, BEFORE), (end, AFTER)):
        axes.plot(
            point.forwards_per_answer, point.pass_at_1, "o", markersize=13, markerfacecolor="none",
            markeredgecolor=colour, markeredgewidth=1.4, zorder=4,
        )  # fmt: skip
    low, high = axes.get_ylim()
    height = low + 0.30 * (high - low)
    axes.annotate(
        "",
        xy=(xs[1], height),
        xytext=(xs[0], height),
        arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2},
    )
    for x, point in zip(xs, (start, end), strict=True):
        axes.plot([x, x], [height, point.pass_at_1], color=INK, linewidth=0.7, linestyle=":", zorder=1)
    axes.annotate(
        text, xy=(float(np.sqrt(xs[0] * xs[1])), height), xytext=(0, 5), textcoords="offset points", ha="center",
        fontsize=9.5, color=INK, weight="bold",
    )  # fmt: skip


class PointLabels:
    """Puts a short label beside each point where it covers neither a point nor another label; else leaves it out."""

    _PLACES = (
        (0, 8, "center", "bottom"),
        (0, -8, "center", "top"),
        (8, 0, "left", "center"),
        (-8, 0, "right", "center"),
    )

    def __init__(self, figure: Any, axes: Any, points: Sequence[FrontierPoint]) -> None:
        from matplotlib.patheffects import withStroke
        from matplotlib.transforms import Bbox

        figure.canvas.draw()  # fixes the layout, which the measured boxes depend on
        self._halo = [withStroke(linewidth=2.5, foreground="white")]
        self._axes, self._renderer = axes, figure.canvas.get_renderer()
        spots = axes.transData.transform([(point.forwards_per_answer, point.pass_at_1) for point in points])
        half = 5 * _DPI / 100
        self._taken = [Bbox([[x - half, y - half], [x + half, y + half]]) for x, y in spots]
        self._taken.append(axes.get_legend().get_window_extent(self._renderer))
        self._frame = axes.get_window_extent(self._renderer)

    def place(self, point: FrontierPoint, colour: str) -> None:
        for dx, dy, horizontal, vertical in self._PLACES:
            label = self._axes.annotate(
                policy_label(point.policy), xy=(point.forwards_per_answer, point.pass_at_1), xytext=(dx, dy),
                textcoords="offset points", ha=horizontal, va=vertical, fontsize=8.5, color=colour, zorder=5,
                path_effects=self._halo,
            )  # fmt: skip
            box = label.get_window_extent(self._renderer)
            inside = self._frame.contains(box.x0, box.y0) and self._frame.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in self._taken):
                self._taken.append(box)
                return
            label.remove()


def policy_label(policy: DecodePolicy) -> str:
    """What stands beside a point: the threshold, or the number of tokens opened in a step."""
    return f"{policy.threshold:g}" if policy.kind == "threshold" else f"{policy.tokens_per_step} per step"


@dataclass(frozen=True)
class Panel:
    """One chart of a figure of curves.

    Attributes:
        key: column of the rows; rows without it are skipped.
        title: what it shows, with its unit.
        log: logarithmic axis.
    """

    key: str
    title: str
    log: bool = False


PRETRAIN_PANELS = (
    Panel("nll_per_token", "negative log-likelihood per masked token (nats)", log=True),
    Panel("block_size", "block size (positions)"),
    Panel("learning_rate", "learning rate"),
    Panel("grad_norm", "gradient norm", log=True),
)


def draw_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], panels: Sequence[Panel]) -> None:
    """Metrics over training steps, a chart per panel, a line per run.

    Args:
        runs: name to rows; a row has `step` and numbers.
        panels: those that no run has a number for are left out.
    Raises:
        ValueError: nothing to draw.
    """
    shown = [panel for panel in panels if any(_series(rows, panel.key)[0] for rows in runs.values())]
    if not shown:
        raise ValueError(f"no run has any of {', '.join(panel.key for panel in panels)}")
    from matplotlib.ticker import FuncFormatter

    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    figure = new_figure(4.6 * columns, 2.5 * lines)
    for number, panel in enumerate(shown, start=1):
        axes = figure.add_subplot(lines, columns, number)
        style_axes(axes, panel.title)
        axes.title.set_fontsize(9.5)
        for (name, rows), colour in zip(
            runs.items(), _SERIES * (1 + len(runs) // len(_SERIES)), strict=False
        ):
            steps, values = _series(rows, panel.key)
            marker = "o" if len(steps) < 25 else None
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=3.5, label=name)
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(_plain_tick))
            axes.yaxis.set_minor_formatter(FuncFormatter(_plain_tick))
            axes.tick_params(which="minor", labelsize=7.5)
        if number > len(shown) - columns:
            axes.set_xlabel("step", fontsize=9)
        if number == 1 and len(runs) > 1:
            axes.legend(frameon=False, fontsize=8.5)
    save_figure(figure, path)


def _plain_tick(value: float, _: int) -> str:
    """1, 2 and 5 of every decade, as plain numbers."""
    return f"{value:g}" if value > 0.0 and f"{value:e}"[0] in "125" else ""


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw_steps_histogram(
    path: Path,
    before: Sequence[Trajectory],
    after: Sequence[Trajectory] = (),
    *,
    title: str = "Forwards per answer",
) -> None:
    """How many answers took how many forwards; with `after`, both models over the same bins.

    Shares, not counts, so that the two sides may have different numbers of answers.
    """
    sides = [("before", BEFORE, before), ("after", AFTER, after)] if after else [("model", AFTER, before)]
    longest = max(trajectory.forwards for _, _, trajectories in sides for trajectory in trajectories)
    width = max(1, -(-longest // 48))
    edges = np.arange(0.5, longest + width + 0.5, width)
    figure = new_figure(8.0, 3.4)
    axes = figure.add_subplot()
    style_axes(axes, title)
    for name, colour, trajectories in sides:
        forwards = np.array([trajectory.forwards for trajectory in trajectories])
        label = f"{name}: mean {forwards.mean():.2f}, median {np.median(forwards):g}"
        shares = np.full(len(forwards), 100.0 / len(forwards))
        axes.hist(forwards, edges, weights=shares, color=colour, alpha=0.65, label=label, rwidth=0.92)
        axes.axvline(forwards.mean(), color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_xlabel("forwards" if width == 1 else f"forwards, {width} to a bin", fontsize=10)
    axes.set_ylabel("answers (%)", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
