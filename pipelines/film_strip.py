"""The canvas of an answer, forward by forward, as a PNG: rows are steps, columns are positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fewstep.pipelines.figures import AFTER, INK, new_figure, save_figure
from fewstep.platform.records import Trajectory

# Inches per character of 7 pt monospace, and per row.
_CHARACTER, _ROW = 0.0605, 0.17
_FONT_SIZE = 7.0
WRITTEN, NEW, MASKED, AHEAD = "#e7f0fa", AFTER, "#c3c9d0", "#eff1f3"
_LEGEND = (
    (NEW, "written by this forward"),
    (WRITTEN, "written before"),
    (MASKED, "masked"),
    (AHEAD, "later block"),
)


@dataclass(frozen=True)
class Strip:
    """One trajectory to draw; `texts` are those of its canvas (`token_texts`)."""

    title: str
    trajectory: Trajectory
    texts: Sequence[str]


def token_texts(tokenizer: Tokenizer, trajectory: Trajectory) -> list[str]:
    """The text of each canvas position on its own, special tokens by name.

    `⏎` breaks a line, `›` indents by four, `·` is a character that cannot be shown, or no text at all.
    """
    texts = (tokenizer.decode([int(token)], skip_special_tokens=False) for token in trajectory.canvas_ids)
    shown = (text.replace("\n", "⏎").replace("    ", "›") for text in texts)
    return ["".join(c if c.isprintable() else "·" for c in text) or "·" for text in shown]


def draw_film_strips(path: Path, strips: Sequence[Strip], block_size: int) -> None:
    """One strip below the other, on one scale; what lies after the end of sequence is not shown.

    Args:
        block_size: positions per block; blocks are aligned at absolute position 0.
    """
    heights = [(strip.trajectory.forwards + 2.6) * _ROW for strip in strips]
    widths = [sum(_cell_widths(strip)) for strip in strips]
    # Row numbers stand left of the cells.
    figure = new_figure((max(widths) + 4) * _CHARACTER + 0.3, sum(heights) + 0.45)
    grid = figure.add_gridspec(len(strips), 1, height_ratios=heights)
    for row, strip in enumerate(strips):
        axes = figure.add_subplot(grid[row])
        _draw(axes, strip, block_size)
        axes.set_xlim(-4, max(widths))
        axes.set_ylim(strip.trajectory.forwards, -0.2)
        axes.set_title(strip.title, loc="left", fontsize=9, color=INK, pad=4)
        axes.axis("off")
    _legend(figure)
    save_figure(figure, path)


def _cell_widths(strip: Strip) -> list[int]:
    """Characters of each shown position, with room to both sides."""
    return [len(text) + 1 for text in strip.texts[: strip.trajectory.num_tokens]]


def _draw(axes: Any, strip: Strip, block_size: int) -> None:
    trajectory = strip.trajectory
    widths = _cell_widths(strip)
    lefts = np.concatenate(([0], np.cumsum(widths)))
    written = trajectory.step_map[: trajectory.num_tokens]
    blocks = (len(trajectory.prompt_ids) + np.arange(len(written))) // block_size
    for step in range(trajectory.forwards):
        axes.text(-0.8, step + 0.5, str(step + 1), fontsize=6, color="#6e7781", ha="right", va="center")
        colours = row_colours(written, blocks, step)
        spans = [(left + 0.1, width - 0.2) for left, width in zip(lefts[:-1], widths, strict=True)]
        axes.broken_barh(spans, (step + 0.07, 0.86), facecolors=colours)
        for position in np.flatnonzero((written >= 0) & (written <= step)).tolist():
            new = written[position] == step
            axes.text(
                lefts[position] + widths[position] / 2, step + 0.5, strip.texts[position].strip() or " ",
                fontsize=_FONT_SIZE, family="monospace", color="white" if new else INK, ha="center",
                va="center_baseline", parse_math=False,
            )  # fmt: skip
    for edge in lefts[1:-1][np.diff(blocks) > 0]:
        axes.plot([edge, edge], [-0.1, trajectory.forwards], color=INK, linewidth=0.8)


def row_colours(written: NDArray[np.int16], blocks: NDArray[np.int64], step: int) -> list[str]:
    """The colour of every position after forward `step`."""
    open_before = (written < 0) | (written >= step)
    live = blocks[open_before].min() if open_before.any() else blocks[-1] + 1
    colours = np.where(blocks > live, AHEAD, np.where(open_before, MASKED, WRITTEN))
    return [str(colour) for colour in np.where(written == step, NEW, colours)]


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=label) for colour, label in _LEGEND]
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        fontsize=7.5,
        handlelength=1.2,
    )
