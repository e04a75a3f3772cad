"""Rollouts in Parquet: one published schema, exact round trip, readable by pandas.

One row is one rollout. Per-token columns are lists; the policy and the verdict are flattened into columns with
their name as prefix, so that `frame.groupby("verdict_outcome")` works without unpacking. Units: `*_seconds` are
seconds, `forwards` and `step_map` count forwards, probabilities are natural (confidence) and natural-log
(logprob). The file's own facts (run, step, commit) travel as JSON in the schema metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fewstep.platform.artifacts import atomic_file, file_digest
from fewstep.platform.errors import UserError
from fewstep.platform.records import DecodePolicy, Rollout, Trajectory, Verdict

SCHEMA_VERSION = 2

_TOKEN_COLUMNS: dict[str, pa.DataType] = {
    "prompt_ids": pa.int32(),
    "canvas_ids": pa.int32(),
    "step_map": pa.int16(),
    "confidence": pa.float32(),
    "logprob": pa.float32(),
    "edit_position": pa.int32(),
    "edit_step": pa.int16(),
    "edit_token": pa.int32(),
    "edit_logprob": pa.float32(),
    "suffix_ids": pa.int32(),
}

SCHEMA = pa.schema(
    [
        pa.field("task_id", pa.string(), nullable=False),
        pa.field("group_id", pa.int64(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("advantage", pa.float64(), nullable=False),
        *(pa.field(name, pa.list_(kind), nullable=False) for name, kind in _TOKEN_COLUMNS.items()),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("forwards", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("cache_drift", pa.float64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("weight_version_first", pa.string(), nullable=False),
        pa.field("weight_version_last", pa.string(), nullable=False),
        pa.field("policy_kind", pa.string(), nullable=False),
        pa.field("policy_threshold", pa.float64(), nullable=False),
        pa.field("policy_tokens_per_step", pa.int32(), nullable=False),
        pa.field("policy_entropy_bound", pa.float64(), nullable=False),
        pa.field("policy_factor", pa.float64(), nullable=False),
        pa.field("policy_block_size", pa.int32(), nullable=True),
        pa.field("policy_cache", pa.string(), nullable=False),
        pa.field("policy_refresh_every", pa.int32(), nullable=True),
        pa.field("policy_edit_threshold", pa.float64(), nullable=True),
        pa.field("policy_max_edit_steps", pa.int32(), nullable=False),
        pa.field("policy_max_steps_per_block", pa.int32(), nullable=True),
        pa.field("policy_temperature", pa.float64(), nullable=False),
        pa.field("policy_top_p", pa.float64(), nullable=False),
        pa.field("policy_seed", pa.int64(), nullable=False),
        pa.field("verdict_outcome", pa.string(), nullable=False),
        pa.field("verdict_score", pa.float64(), nullable=False),
        pa.field("verdict_tests", pa.list_(pa.bool_()), nullable=False),
        pa.field("verdict_seconds", pa.float64(), nullable=False),
        pa.field("verdict_isolation", pa.string(), nullable=False),
        pa.field("verdict_detail", pa.string(), nullable=False),
    ]
)

_TRAJECTORY_SCALARS = (
    "num_tokens", "forwards", "finish_reason", "cache_drift", "seed", "weight_version_first", "weight_version_last"
)  # fmt: skip
_POLICY_FIELDS = tuple(DecodePolicy.model_fields)
_VERDICT_FIELDS = ("outcome", "score", "tests", "seconds", "isolation", "detail")
_ROLLOUT_FIELDS = ("task_id", "group_id", "sample", "text", "reward", "advantage")


def write_rollouts(path: Path, rollouts: Sequence[Rollout], metadata: Mapping[str, Any]) -> None:
    """Writes rollouts to one Parquet file, whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        rollouts: may be empty.
        metadata: JSON-serialisable facts about the file; `read_metadata` gives them back.
    Raises:
        ResourceError: the disk is full.
    """
    columns = {field.name: _column(field, rollouts) for field in SCHEMA}
    schema = SCHEMA.with_metadata(
        {"fewstep.schema_version": str(SCHEMA_VERSION), "fewstep.metadata": json.dumps(dict(metadata))}
    )
    table = pa.Table.from_arrays([columns[field.name] for field in SCHEMA], schema=schema)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a file, in the order they were written; arrays and NaNs are bit-identical.

    Raises:
        UserError: not a Parquet file, or one of another schema.
    """
    table = _open(path).read().combine_chunks()
    tokens = {name: _split(table.column(name)) for name in _TOKEN_COLUMNS}
    scalars = {name: table.column(name).to_pylist() for name in table.column_names if name not in tokens}
    return [_rollout(tokens, scalars, row) for row in range(table.num_rows)]


def read_metadata(path: Path) -> dict[str, Any]:
    """The facts given to `write_rollouts`. Raises UserError as `read_rollouts` does."""
    stored = _open(path).schema_arrow.metadata
    facts: dict[str, Any] = json.loads(stored[b"fewstep.metadata"])
    return facts


def describe_rollouts(paths: Iterable[Path], base: Path) -> list[dict[str, Any]]:
    """What a run points to instead of copying it: path (relative to `base`), rows, bytes and SHA-256 of each file.

    Raises:
        UserError: one of them is no rollout file.
    """
    return [
        {
            "path": Path(path).relative_to(base).as_posix(),
            "rows": int(_open(path).metadata.num_rows),
            "bytes": Path(path).stat().st_size,
            "sha256": file_digest(path),
        }
        for path in sorted(paths)
    ]


def _column(field: pa.Field, rollouts: Sequence[Rollout]) -> pa.Array:
    name = field.name
    if name in _TOKEN_COLUMNS:
        return _join([getattr(rollout.trajectory, name) for rollout in rollouts], _TOKEN_COLUMNS[name])
    return pa.array([_value(rollout, name) for rollout in rollouts], type=field.type)


def _value(rollout: Rollout, name: str) -> Any:
    if name == "verdict_detail":
        # Written by the program under test: a lone surrogate in it must not stop the run.
        return rollout.verdict.detail.encode("utf-8", "backslashreplace").decode()
    if name.startswith("policy_"):
        return getattr(rollout.trajectory.policy, name.removeprefix("policy_"))
    if name.startswith("verdict_"):
        return getattr(rollout.verdict, name.removeprefix("verdict_"))
    owner = rollout.trajectory if name in _TRAJECTORY_SCALARS else rollout
    return getattr(owner, name)


def _join(arrays: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.ListArray:
    """Arrays [n_i] as one list column, through one flat buffer."""
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    dtype = kind.to_pandas_dtype()
    flat = np.concatenate(arrays) if arrays else np.empty(0, dtype)
    if flat.dtype != dtype:
        raise TypeError(f"token column holds {flat.dtype}, the record says {np.dtype(dtype)}")
    # from_pandas=False is what keeps a NaN a NaN instead of a null.
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind, from_pandas=False))


def _split(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    if column.num_chunks == 0:
        return []
    lists = column.combine_chunks()
    flat = lists.values.to_numpy(zero_copy_only=False)
    offsets = lists.offsets.to_numpy()
    return [flat[start:stop].copy() for start, stop in pairwise(offsets)]


def _rollout(tokens: Mapping[str, list[NDArray[Any]]], scalars: Mapping[str, list[Any]], row: int) -> Rollout:
    policy = DecodePolicy(**{name: scalars[f"policy_{name}"][row] for name in _POLICY_FIELDS})
    verdict = {name: scalars[f"verdict_{name}"][row] for name in _VERDICT_FIELDS}
    fields: dict[str, Any] = {name: arrays[row] for name, arrays in tokens.items()}
    fields |= {name: scalars[name][row] for name in _TRAJECTORY_SCALARS}
    trajectory = Trajectory(**fields, policy=policy)
    return Rollout(
        **{name: scalars[name][row] for name in _ROLLOUT_FIELDS},
        trajectory=trajectory,
        verdict=Verdict(**{**verdict, "tests": tuple(verdict["tests"])}),
    )


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a readable Parquet file"
        raise UserError(str(path), reason, "a rollout file written by Fewstep", "check the path") from error
    if not file.schema_arrow.equals(SCHEMA):
        version = (file.schema_arrow.metadata or {}).get(b"fewstep.schema_version", b"none").decode()
        raise UserError(
            str(path), f"schema version {version}", f"rollout schema version {SCHEMA_VERSION}",
            "read it with the release that wrote it",
        )  # fmt: skip
    return file
