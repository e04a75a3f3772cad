"""Figures: files that are whole PNGs, what they show by their artists, and colours of a canvas by hand."""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fewstep.pipelines import figures
from fewstep.pipelines.figures import Panel, draw_curves, draw_frontier, draw_steps_histogram, policy_label
from fewstep.pipelines.film_strip import (
    AHEAD,
    MASKED,
    NEW,
    WRITTEN,
    Strip,
    draw_film_strips,
    row_colours,
    token_texts,
)
from fewstep.pipelines.frontier import SEQUENTIAL, compare
from fewstep.pipelines.tasks.family import tasks
from fewstep.pipelines.tasks.vocabulary import build_tokenizer, encode_pair
from fewstep.platform.records import DecodePolicy, FrontierPoint, Trajectory


def point(threshold: float | None, pass_at_1: float, forwards: float) -> FrontierPoint:
    policy = SEQUENTIAL if threshold is None else DecodePolicy(threshold=threshold)
    return FrontierPoint(policy, pass_at_1, forwards, 1.0, 10.0, 500, {})


@functools.cache
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def trajectory(forwards: int) -> Trajectory:
    """A family task's own answer, spread evenly over so many forwards."""
    task = tasks(1, seed=0, held_out=True)[0]
    ids, num_prompt = encode_pair(tokenizer(), task.prompt, task.canonical_solution)
    canvas = ids[num_prompt:].astype(np.int32)
    steps = (np.arange(len(canvas)) * forwards // len(canvas)).astype(np.int16)
    scores = np.zeros(len(canvas), np.float32)
    return Trajectory(
        ids[:num_prompt].astype(np.int32), canvas, steps, scores, scores, len(canvas), forwards, "stop",
        SEQUENTIAL, 0, "", "",
    )  # fmt: skip


BEFORE = [point(None, 0.94, 40.0), point(0.9, 0.93, 12.0), point(0.5, 0.6, 6.0)]
AFTER = [point(None, 0.94, 40.0), point(0.9, 0.94, 5.0), point(0.5, 0.93, 4.0)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The figure that was last saved; saving goes on as always."""
    kept: list[Any] = []
    save = figures.save_figure

    def keep(figure: Any, path: Path) -> None:
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save_figure", keep)
    return lambda: kept[-1]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


def test_the_frontier_shows_both_curves_the_bar_and_the_gain(
    tmp_path: Path, drawn: Callable[[], Any]
) -> None:
    speedup = compare(BEFORE, AFTER)
    draw_frontier(tmp_path / "frontier.png", BEFORE, AFTER, speedup=speedup)
    width, height = png_size(tmp_path / "frontier.png")
    assert (width, height) == (1280, 800)
    axes = drawn().axes[0]
    assert axes.get_xscale() == "log"
    names = {text.get_text() for text in axes.get_legend().get_texts()}
    assert names == {"before, threshold", "before, tokens per step", "after, threshold", "after, tokens per step",
                     "bar: 0.930"}  # fmt: skip
    texts = [text.get_text() for text in axes.texts]
    assert sorted(text for text in texts if text and "fewer" not in text) == sorted(
        ["0.9", "0.5", "1 per step"] * 2
    )
    assert "3.0x fewer" in texts
    data = {(x, y) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
    assert {(p.forwards_per_answer, p.pass_at_1) for p in (*BEFORE, *AFTER)} <= data
    assert list(tmp_path.iterdir()) == [tmp_path / "frontier.png"]


def test_a_refined_model_below_the_bar_gets_no_arrow(tmp_path: Path, drawn: Callable[[], Any]) -> None:
    worse = [point(None, 0.5, 40.0)]
    draw_frontier(tmp_path / "frontier.png", BEFORE, worse, speedup=compare(BEFORE, worse))
    assert [text.get_text() for text in drawn().axes[0].texts if "fewer" in text.get_text()] == []


def test_labels_never_cover_each_other(tmp_path: Path, drawn: Callable[[], Any]) -> None:
    crowd = [
        point(None, 0.94, 40.0),
        *(point(0.1 + i / 20, 0.93 - i / 10000, 4.0 + i / 500) for i in range(16)),
    ]
    draw_frontier(tmp_path / "frontier.png", crowd, bar=0.93)
    figure = drawn()
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in figure.axes[0].texts]
    assert 2 <= len(boxes) < len(crowd)  # some had no room and were left out
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_curves_have_a_line_per_run_and_skip_absent_panels(tmp_path: Path, drawn: Callable[[], Any]) -> None:
    runs = {
        "distill": [{"step": 1, "pass": 0.5, "nll": 2.0}, {"step": 2, "pass": 0.6, "nll": None}],
        "seed": [{"step": 1, "pass": 0.4}],
    }
    panels = (Panel("pass", "pass rate"), Panel("nll", "nll", log=True), Panel("absent", "absent"))
    draw_curves(tmp_path / "curves.png", runs, panels)
    png_size(tmp_path / "curves.png")
    passes, nll = drawn().axes
    assert [line.get_label() for line in passes.lines] == ["distill", "seed"]
    assert passes.lines[0].get_xydata().tolist() == [[1.0, 0.5], [2.0, 0.6]]
    assert nll.get_yscale() == "log"
    assert nll.lines[0].get_xydata().tolist() == [[1.0, 2.0]]
    with pytest.raises(ValueError, match="absent"):
        draw_curves(tmp_path / "curves.png", runs, panels[2:])


def test_the_histogram_counts_shares_of_answers(tmp_path: Path, drawn: Callable[[], Any]) -> None:
    before = [trajectory(4), trajectory(4), trajectory(4), trajectory(2)]
    draw_steps_histogram(tmp_path / "steps.png", before, [trajectory(1)])
    png_size(tmp_path / "steps.png")
    axes = drawn().axes[0]
    first, second = axes.containers
    assert [round(bar.get_height(), 6) for bar in first] == [0.0, 25.0, 0.0, 75.0]
    assert [round(bar.get_height(), 6) for bar in second] == [100.0, 0.0, 0.0, 0.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "before: mean 3.50, median 4", "after: mean 1.00, median 1",
    ]  # fmt: skip


def test_a_film_strip_has_a_row_per_forward(tmp_path: Path) -> None:
    slow, fast = trajectory(12), trajectory(3)
    strips = [
        Strip("slow", slow, token_texts(tokenizer(), slow)),
        Strip("fast", fast, token_texts(tokenizer(), fast)),
    ]
    draw_film_strips(tmp_path / "both.png", strips, block_size=16)
    draw_film_strips(tmp_path / "fast.png", strips[1:], block_size=16)
    (width, both), (same_width, only) = png_size(tmp_path / "both.png"), png_size(tmp_path / "fast.png")
    assert width == same_width
    # Twelve more forwards, a heading, 0.17 inches at 160 dots each.
    assert both - only == pytest.approx((12 + 2.6) * 0.17 * 160, abs=2)


def test_texts_of_a_canvas_join_to_the_answer() -> None:
    answer = trajectory(3)
    texts = token_texts(tokenizer(), answer)
    text = "".join(texts).replace("›", "    ").replace("⏎", "\n")
    assert text == tasks(1, seed=0, held_out=True)[0].canonical_solution + "<|eos|>"


def test_what_has_no_glyph_is_shown_as_a_dot() -> None:
    answer = trajectory(3)
    ids = np.array([tokenizer().encode("\x05").ids[0], tokenizer().token_to_id("<|mask|>")], np.int32)
    assert token_texts(tokenizer(), dataclasses.replace(answer, canvas_ids=ids)) == ["·", "<|mask|>"]


def test_colours_tell_new_old_masked_and_later_blocks() -> None:
    written, blocks = np.array([0, 1, 0, 2, -1], np.int16), np.array([0, 0, 0, 1, 1])
    assert row_colours(written, blocks, 0) == [NEW, MASKED, NEW, AHEAD, AHEAD]
    assert row_colours(written, blocks, 1) == [WRITTEN, NEW, WRITTEN, AHEAD, AHEAD]
    assert row_colours(written, blocks, 2) == [WRITTEN, WRITTEN, WRITTEN, NEW, MASKED]


def test_labels_name_the_policy() -> None:
    assert policy_label(DecodePolicy(threshold=0.95)) == "0.95"
    assert policy_label(DecodePolicy(kind="static", tokens_per_step=4)) == "4 per step"
