"""bench/serving.py: its fuzz cases are keyed and of every kind, and its parts keep each other's results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from bench.serving import _record
from bench.serving_parts.cases import ENDPOINTS, make_case


def test_cases_are_keyed_and_of_every_kind() -> None:
    cases = [make_case(number, "m") for number in range(600)]
    assert cases == [make_case(number, "m") for number in range(600)]
    assert cases != [make_case(number, "m", seed=1) for number in range(600)]
    kinds = Counter(case.kind for case in cases)
    assert set(kinds) == {"typed", "hostile", "mutated", "raw body", "giant", "headers", "wire"}
    assert min(kinds.values()) > 20
    assert {case.path for case in cases} == set(ENDPOINTS)
    assert any(b"\xed\xa0\x80" in case.body for case in cases), "a raw surrogate"
    assert max(len(case.body) for case in cases) > 100_000


def test_a_part_replaces_its_own_result_only(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    fuzz = {"requests": 10, "errors_5xx": 0, "leaked_pages": 0.0, "failures": []}
    _record(out, "fuzz", fuzz)
    _record(out, "recovery", {"recovery_s": 2.5})
    _record(out, "fuzz", {**fuzz, "requests": 20})
    found = json.loads(out.read_text())
    assert found["fuzz"] == {"requests": 20, "errors_5xx": 0, "leaked_pages": 0.0}
    assert found["recovery_s"] == 2.5
    assert found["parts"]["recovery"]["machine"]["cpu"]
