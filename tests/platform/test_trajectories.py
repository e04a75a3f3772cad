"""Rollouts survive Parquet bit for bit, and a file of another shape is refused."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewstep.platform.errors import UserError
from fewstep.platform.records import KIND_NUMBERS, DecodePolicy, Rollout, Trajectory, Verdict
from fewstep.platform.trajectories import SCHEMA, read_metadata, read_rollouts, write_rollouts

text = st.text(st.characters(codec="utf-8"), max_size=12)
unit = st.floats(0.0, 1.0, width=32)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    num_tokens, num_edits = draw(st.integers(0, 6)), draw(st.integers(0, 3))
    floats = st.lists(st.floats(width=32), min_size=num_tokens, max_size=num_tokens)
    seeds = st.integers(0, 2**63 - 1)
    kind = draw(st.sampled_from(list(KIND_NUMBERS)))
    number = draw(st.integers(1, 64) if kind == "static" else st.floats(0.01, 1.0))
    cache = draw(st.sampled_from(["exact", "none", "prefix", "dual"]))
    edit_threshold = draw(st.none() | st.floats(0.01, 1.0))
    policy = DecodePolicy(
        kind=kind,
        **{KIND_NUMBERS[kind]: number},
        block_size=draw(st.none() | st.integers(1, 64)),
        cache=cache,
        refresh_every=draw(st.none() | st.integers(1, 9)) if cache in ("prefix", "dual") else None,
        edit_threshold=edit_threshold,
        max_edit_steps=draw(st.integers(0, 9)) if edit_threshold else 16,
        max_steps_per_block=draw(st.none() | st.integers(1, 64)),
        temperature=draw(st.floats(0.0, 2.0)),
        top_p=draw(st.floats(0.01, 1.0)),
        seed=draw(seeds),
    )
    trajectory = Trajectory(
        prompt_ids=np.array(draw(st.lists(st.integers(0, 2**31 - 1), max_size=6)), np.int32),
        canvas_ids=np.arange(num_tokens, dtype=np.int32),
        step_map=np.array(
            draw(st.lists(st.integers(-1, 32767), min_size=num_tokens, max_size=num_tokens)), np.int16
        ),
        confidence=np.array(draw(floats), np.float32),
        logprob=np.array(draw(floats), np.float32),
        num_tokens=num_tokens,
        forwards=draw(st.integers(0, 1000)),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        policy=policy,
        seed=draw(seeds),
        weight_version_first=draw(text),
        weight_version_last=draw(text),
        edit_position=np.arange(num_edits, dtype=np.int32),
        edit_step=np.arange(num_edits, dtype=np.int16),
        edit_token=np.full(num_edits, 7, np.int32),
        edit_logprob=np.full(num_edits, np.float32(-0.5)),
        cache_drift=draw(unit),
        suffix_ids=np.array(draw(st.lists(st.integers(0, 2**31 - 1), max_size=3)), np.int32),
    )
    verdict = Verdict(
        outcome=draw(st.sampled_from(["passed", "timeout", "sandbox_error"])),
        score=draw(unit),
        tests=tuple(draw(st.lists(st.booleans(), max_size=4))),
        seconds=draw(st.floats(0, 1e6)),
        isolation=draw(text),
        detail=draw(text),
    )
    return Rollout(
        task_id=draw(text),
        group_id=draw(st.integers(-(2**63), 2**63 - 1)),
        sample=draw(st.integers(0, 2**31 - 1)),
        text=draw(text),
        trajectory=trajectory,
        verdict=verdict,
        reward=draw(st.floats()),
        advantage=draw(st.floats()),
    )


def bits(value: object) -> object:
    """A value in which equality means equality of bits, NaN included."""
    if dataclasses.is_dataclass(value):
        return {field.name: bits(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return struct.pack("<d", value)
    return value


def one() -> Rollout:
    trajectory = Trajectory(
        prompt_ids=np.array([1, 2], np.int32),
        canvas_ids=np.array([3, 4, 4], np.int32),
        step_map=np.array([0, 1, 1], np.int16),
        confidence=np.array([0.9, 0.8, np.nan], np.float32),
        logprob=np.array([-0.1, -0.2, np.nan], np.float32),
        num_tokens=2,
        forwards=2,
        finish_reason="stop",
        policy=DecodePolicy(),
        seed=7,
        weight_version_first="run:0:abc",
        weight_version_last="run:1:def",
    )
    return Rollout("task", 3, 1, "x", trajectory, Verdict("passed", 1.0, (True,), 0.01, "process"), 1.0, 0.5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(rollouts(), max_size=4))
def test_round_trip_is_exact(tmp_path: Path, batch: list[Rollout]) -> None:
    path = tmp_path / "rollouts.parquet"
    write_rollouts(path, batch, {})
    assert [bits(rollout) for rollout in read_rollouts(path)] == [bits(rollout) for rollout in batch]


def test_every_field_of_the_records_has_a_column() -> None:
    expected = {field.name for record in (Rollout, Trajectory) for field in dataclasses.fields(record)}
    expected -= {"trajectory", "verdict", "policy"}
    expected |= {f"policy_{name}" for name in DecodePolicy.model_fields}
    expected |= {f"verdict_{field.name}" for field in dataclasses.fields(Verdict)}
    assert set(SCHEMA.names) == expected


def test_metadata_comes_back(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r.parquet", [], {"run": "a", "step": 3, "nested": {"x": [1, None]}})
    assert read_metadata(tmp_path / "r.parquet") == {"run": "a", "step": 3, "nested": {"x": [1, None]}}
    assert read_rollouts(tmp_path / "r.parquet") == []


def test_pandas_reads_it(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r.parquet", [one(), one()], {})
    frame = pd.read_parquet(tmp_path / "r.parquet")
    assert list(frame.columns) == SCHEMA.names
    assert frame.groupby("verdict_outcome").reward.sum()["passed"] == 2.0
    assert np.isnan(frame.confidence[0][2])
    assert frame.step_map[0].dtype == np.int16


def test_a_lone_surrogate_from_the_program_does_not_stop_the_run(tmp_path: Path) -> None:
    verdict = dataclasses.replace(one().verdict, detail="ValueError: \ud800")
    write_rollouts(tmp_path / "r.parquet", [dataclasses.replace(one(), verdict=verdict)], {})
    assert read_rollouts(tmp_path / "r.parquet")[0].verdict.detail == "ValueError: \\ud800"


def test_a_wrong_dtype_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    trajectory = dataclasses.replace(one().trajectory, confidence=np.zeros(3))
    with pytest.raises(TypeError, match="float64"):
        write_rollouts(tmp_path / "r.parquet", [dataclasses.replace(one(), trajectory=trajectory)], {})
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rollouts(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_rollouts(tmp_path / "text.parquet")
    pq.write_table(pa.table({"task_id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="schema version none"):
        read_rollouts(tmp_path / "other.parquet")
