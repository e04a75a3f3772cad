"""A load test as a picture: latencies as cumulative shares, and what arrived over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.pipelines.figures import AFTER, BEFORE, FAINT, INK, new_figure, save_figure, style_axes
from fewstep.pipelines.load_summary import PERCENTILES, Sample


def draw_load(path: Path, samples: Sequence[Sample], report: dict[str, Any], title: str) -> None:
    """Time to first block, time between blocks, and committed blocks a second, as a PNG."""
    answered = [sample for sample in samples if sample.answered]
    figure = new_figure(12.0, 4.0)
    axes = figure.subplots(1, 3)
    first = [sample.commits[0] - sample.due for sample in answered if sample.commits]
    gaps = [gap for sample in answered for gap in np.diff(sample.commits)]
    _shares(axes[0], "time to first block", first)
    _shares(axes[1], "time between blocks", gaps)
    _over_time(axes[2], samples)
    rate, tpf = report["committed_tokens_per_s"], report["tokens_per_forward"]
    figure.suptitle(
        f"{title}: {rate:,.0f} committed tokens/s"
        + (f", {tpf:.2f} tokens per forward" if tpf else "")
        + f", {report['answered']} of {report['requests']} answered",
        color=INK,
    )
    save_figure(figure, path)


def _shares(axes: Any, title: str, values: Sequence[float]) -> None:
    style_axes(axes, title)
    axes.set_xlabel("seconds")
    axes.set_ylabel("share of answers" if "first" in title else "share of blocks")
    if not values:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=INK)
        return
    ordered = np.sort(np.asarray(values))
    axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", color=AFTER)
    for which in PERCENTILES:
        value = float(np.percentile(ordered, which))
        axes.axvline(value, color=FAINT, linewidth=0.8, zorder=0)
        axes.annotate(f"p{which} {value:.3g} s", (value, which / 100), xytext=(4, -10), textcoords="offset points",
                      fontsize=8, color=INK)  # fmt: skip
    axes.set_ylim(0, 1.02)


def _over_time(axes: Any, samples: Sequence[Sample]) -> None:
    style_axes(axes, "over time")
    axes.set_xlabel("seconds")
    axes.set_ylabel("a second")
    end = max((sample.ended for sample in samples), default=0.0) or 1.0
    edges = np.linspace(0.0, end, min(60, max(2, len(samples) // 4)) + 1)
    width = edges[1] - edges[0]
    commits = [moment for sample in samples for moment in sample.commits]
    for values, name, colour in (
        (commits, "commits", AFTER),
        ([sample.ended for sample in samples if sample.answered], "answers", BEFORE),
    ):
        axes.stairs(np.histogram(values, edges)[0] / width, edges, color=colour, label=name)
    bad = [sample.ended for sample in samples if sample.error]
    if bad:
        axes.stairs(np.histogram(bad, edges)[0] / width, edges, color="#b91c1c", label="errors")
    axes.legend(frameon=False, fontsize=8)
