"""Frontiers as tables: aligned plain text for the terminal, Markdown for reports and the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fewstep.pipelines.frontier import Speedup, cheapest_within
from fewstep.platform.records import FrontierPoint

TableStyle = Literal["plain", "markdown"]

_COLUMNS = ("pass@1", "forwards", "TPF", "tokens/s")
_ABSENT = ("-",) * len(_COLUMNS)


def frontier_table(points: Sequence[FrontierPoint], bar: float, style: TableStyle = "plain") -> str:
    """One frontier, a row per policy; `*` marks the cheapest one that reaches `bar`."""
    chosen = cheapest_within(points, bar)
    rows = [[point.policy.label(), *_cells(point, point is chosen)] for point in points]
    note = _note(bar, points[0].num_tasks)
    return render_table([["policy", *_COLUMNS], *rows], style) + "\n\n" + note


def comparison_table(
    before: Sequence[FrontierPoint],
    after: Sequence[FrontierPoint],
    speedup: Speedup,
    style: TableStyle = "plain",
) -> str:
    """Two frontiers side by side, a row per policy measured on either; `*` marks what `speedup` compares."""
    rows = []
    for policy in dict.fromkeys(point.policy for point in (*before, *after)):
        row = [policy.label()]
        for points, chosen in ((before, speedup.before), (after, speedup.after)):
            found = next((point for point in points if point.policy == policy), None)
            row += _ABSENT if found is None else _cells(found, found is chosen)
        rows.append(row)
    header = ["policy", *(f"{when} {name}" for when in ("before", "after") for name in _COLUMNS)]
    return (
        render_table([header, *rows], style)
        + f"\n\n{_note(speedup.bar, before[0].num_tasks)}\n{speedup.text()}"
    )


def _note(bar: float, num_tasks: int) -> str:
    # Not led by the mark: Markdown would make a list of it.
    return (
        f"Forwards per answer, TPF = tokens per forward; {num_tasks} tasks, one answer each.\n"
        f"Marked * is the cheapest policy at pass@1 of {bar:.3f} or better."
    )


def _cells(point: FrontierPoint, chosen: bool) -> tuple[str, ...]:
    return (
        f"{point.pass_at_1:.3f}",
        f"{point.forwards_per_answer:.2f}{' *' if chosen else ''}",
        f"{point.tokens_per_forward:.2f}",
        f"{point.tokens_per_second:.0f}",
    )


def render_table(rows: list[list[str]], style: TableStyle) -> str:
    """Rows of cells as text, the first one being the heading; a heading of two words takes two lines in plain text."""
    if style == "markdown":
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])
    return "\n".join(_aligned(rows))


def _aligned(rows: list[list[str]]) -> list[str]:
    # Two-word headings take two lines; a mark hangs to the right of its number, so that digits stay in columns.
    header = [name.split(" ") if " " in name else ["", name] for name in rows[0]]
    lines = [[cells[0] for cells in header], [cells[1] for cells in header], *rows[1:]]
    lines = [line for line in lines if any(line)]
    lines = [[cell if cell.endswith(" *") else cell + "  " for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows[0]))]
    text = [
        " ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    num_headings = len(text) - len(rows) + 1
    return [*text[:num_headings], "-" * max(len(line) for line in text), *text[num_headings:]]
