"""The README's results come from a report, through bench/readme_table.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.documents import filled, marks
from bench.readme_table import MARKS, read_report, section

from fewstep.pipelines.frontier import SEQUENTIAL, compare, speedup_record
from fewstep.platform.artifacts import machine_info
from fewstep.platform.errors import ResourceError
from fewstep.platform.records import DecodePolicy, FrontierPoint

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = marks(MARKS)


def point(policy: DecodePolicy, pass_at_1: float, forwards: float) -> FrontierPoint:
    return FrontierPoint(policy, pass_at_1, forwards, 40.0 / forwards, 1234.0, 500, {"passed": 1})


def report_of(folder: Path, refined_pass_at_1: float) -> Path:
    """What `fewstep refine` writes for three policies; its README row depends on these keys only."""
    fast = DecodePolicy(threshold=0.5)
    before = [point(SEQUENTIAL, 0.95, 40.0), point(DecodePolicy(threshold=0.9), 0.944, 16.0)]
    after = [point(SEQUENTIAL, 0.95, 40.0), point(fast, refined_pass_at_1, 8.0)]
    if refined_pass_at_1 < 0.9:
        after = after[1:]
    record = speedup_record(compare(before, after))
    own = {"refine_seconds": 330.0, "machine": machine_info(), "commit": "0123456789abcdef+dirty"}
    path = folder / "report.json"
    path.write_text(json.dumps(record | own))
    return path


def test_the_readme_has_its_markers_once_and_everything_else_stays() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    once = filled(text, MARKS, "first", "README")
    assert f"{BEGIN}\nfirst\n{END}" in once
    assert filled(once, MARKS, "second", "README") == filled(text, MARKS, "second", "README")
    assert once.replace(f"{BEGIN}\nfirst\n{END}", "") == text.replace(
        text[text.index(BEGIN) : text.index(END) + len(END)], ""
    )


def test_a_section_says_what_was_won_and_where(tmp_path: Path) -> None:
    text = section("demo", read_report(report_of(tmp_path, refined_pass_at_1=0.945)))
    assert "| unrefined, one token per step | static_1 | 0.950 ± 0.010 | 40.00 | 1.00 | 1234 |" in text
    assert "| threshold_0.9 | 0.944 ± 0.010 | 16.00 |" in text
    assert "| threshold_0.5 | 0.945 ± 0.010 | 8.00 |" in text
    assert "**2.00x fewer forwards**" in text
    assert "5.00x fewer than one token per step" in text
    assert "commit `0123456789ab+dirty`" in text


def test_a_run_that_missed_the_bar_says_so(tmp_path: Path) -> None:
    text = section("demo", read_report(report_of(tmp_path, refined_pass_at_1=0.5)))
    assert "No policy of the refined model reaches it." in text
    assert "**refined**" not in text


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_markers_that_are_not_a_pair_are_refused(text: str) -> None:
    with pytest.raises(ResourceError):
        filled(text, MARKS, "results", "README")


def test_another_file_is_no_report(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ResourceError, match="sequential"):
        read_report(other)
