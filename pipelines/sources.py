"""Where text comes from: JSONL, Parquet, Hugging Face `datasets` folders and plain trees, cut into units of work.

A unit is a stretch of one file, or some whole small files, that one process reads from start to end without holding it.
Units, their order and the rows of each depend on the sources alone, never on who reads them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fewstep.pipelines.prepare_settings import SourceKind
from fewstep.platform.errors import ConfigError

_JSONL = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst")
_HF_MARKS = ("state.json", "dataset_dict.json")
_TABLE_ROWS = 256


@dataclass(frozen=True)
class Unit:
    """One process's stretch of work.

    Attributes:
        kind: how to read it; paths: one file, or the whole files of a tree.
        start, stop: bytes of a JSONL file, row groups of a Parquet file, record batches of a `datasets` file.
        first_row: rows of the file before the unit; None = known only when the units before it have been read.
        num_bytes: size, for progress and balance.
    """

    kind: SourceKind
    paths: tuple[str, ...]
    start: int
    stop: int
    first_row: int | None
    num_bytes: int


@dataclass(frozen=True)
class Row:
    """One document, or the reason why a row is none.

    Attributes:
        path, number: the file and the row in it, counted from 1 at the unit's start.
        prompt, text: both empty when `reason` says what is wrong.
    """

    path: str
    number: int
    prompt: str
    text: str
    reason: str = ""


@dataclass(frozen=True)
class Columns:
    """The names of the text's and the prompt's column; no prompt where the latter is empty."""

    text: str
    prompt: str

    @property
    def wanted(self) -> list[str]:
        return [self.text, self.prompt] if self.prompt else [self.text]


def find_files(sources: Sequence[str], kind: str, suffixes: Sequence[str]) -> list[tuple[SourceKind, Path]]:
    """Every file of the sources in a fixed order: as given, and sorted by name inside a folder.

    Raises:
        ConfigError: a path that is not there, or whose kind cannot be told.
    """
    found: list[tuple[SourceKind, Path]] = []
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise ConfigError("sources", source, "files and folders that exist", "check the path")
        found += _folder_files(path, kind, suffixes) if path.is_dir() else [(_file_kind(path, kind), path)]
    return found


def plan_units(files: Sequence[tuple[SourceKind, Path]], columns: Columns, unit_bytes: int) -> list[Unit]:
    """Cut files into units of about `unit_bytes`.

    Raises:
        ConfigError: a table without the wanted column, or a file that cannot be read as what it is.
    """
    units: list[Unit] = []
    tree: list[Path] = []
    for kind, path in files:
        if kind == "files":
            tree.append(path)
        elif kind == "jsonl":
            units += _jsonl_units(path, unit_bytes)
        else:
            units += _table_units(kind, path, columns, unit_bytes)
    return units + _tree_units(tree, unit_bytes)


def read_rows(unit: Unit, columns: Columns) -> Iterator[Row]:
    """The rows of a unit in order, good and bad ones; holds a few at a time."""
    if unit.kind == "files":
        for path in unit.paths:
            yield _file_row(path)
        return
    path = unit.paths[0]
    if unit.kind == "jsonl":
        for number, line in enumerate(_lines(path, unit.start, unit.stop), start=1):
            yield _json_row(path, number, line, columns)
        return
    number = 0
    for batch in _table_batches(unit, columns):
        texts = batch.column(columns.text).to_pylist()
        prompts = batch.column(columns.prompt).to_pylist() if columns.prompt else [""] * len(texts)
        for prompt, text in zip(prompts, texts, strict=True):
            number += 1
            yield _checked(path, number, prompt, text, columns)


def _folder_files(folder: Path, kind: str, suffixes: Sequence[str]) -> list[tuple[SourceKind, Path]]:
    if kind == "datasets" or (kind == "auto" and any((folder / mark).is_file() for mark in _HF_MARKS)):
        return [("datasets", path) for path in _hf_files(folder)]
    if kind == "files":
        return [("files", path) for path in _tree_files(folder, suffixes)]
    tables = {path: found for path in _tree_files(folder, ()) if (found := _table_kind(path))}
    if kind == "auto" and not any(path.parent == folder for path in tables):
        return [("files", path) for path in _tree_files(folder, suffixes)]
    return [(found, path) for path, found in tables.items() if kind in ("auto", found)]


def _file_kind(path: Path, kind: str) -> SourceKind:
    if kind != "auto":
        return kind  # type: ignore[return-value]
    if path.suffix == ".arrow":
        return "datasets"
    return _table_kind(path) or "files"


def _table_kind(path: Path) -> SourceKind | None:
    if path.suffix == ".parquet":
        return "parquet"
    packed = path.suffix in _COMPRESSED
    suffix = path.with_suffix("").suffix if packed else path.suffix
    return "jsonl" if suffix in _JSONL or (packed and suffix == ".json") else None


def _tree_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files below a folder whose names end as wanted, hidden ones and links left out, sorted by path."""
    found = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        wanted = not suffixes or path.name.endswith(tuple(suffixes))
        if wanted and not hidden and path.is_file() and not path.is_symlink():
            found.append(path)
    return sorted(found)


def _hf_files(folder: Path) -> list[Path]:
    """The Arrow files of `Dataset.save_to_disk`, or of every split of `DatasetDict.save_to_disk`."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            return [path for split in splits for path in _hf_files(folder / split)]
        state = json.loads((folder / "state.json").read_text())
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "sources", f"{folder} ({error})", "a folder that `datasets` saved whole", "save it again"
        ) from error


def _jsonl_units(path: Path, unit_bytes: int) -> list[Unit]:
    size = path.stat().st_size
    if path.suffix in _COMPRESSED:  # a compressed stream has no places to enter at
        return [Unit("jsonl", (str(path),), 0, -1, 0, size)]
    starts = range(0, size, unit_bytes)
    return [
        Unit("jsonl", (str(path),), start, min(size, start + unit_bytes), None if start else 0,
             min(size, start + unit_bytes) - start)
        for start in starts
    ]  # fmt: skip


def _table_units(kind: SourceKind, path: Path, columns: Columns, unit_bytes: int) -> list[Unit]:
    try:
        names, pieces = _parquet_pieces(path) if kind == "parquet" else _stream_pieces(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            "sources", f"{path} ({reason})", f"a readable {kind} file", "copy it again"
        ) from error
    if missing := [name for name in columns.wanted if name not in names]:
        key = "text_column" if missing[0] == columns.text else "prompt_column"
        raise ConfigError(key, f"{missing[0]!r}, which {path} has not", ", ".join(names), f"set {key}")
    units, first, row, held, rows = [], 0, 0, 0, 0
    for index, (num_rows, num_bytes) in enumerate(pieces, start=1):
        held, rows = held + num_bytes, rows + num_rows
        if held >= unit_bytes or index == len(pieces):
            units.append(Unit(kind, (str(path),), first, index, row, held))
            first, row, held, rows = index, row + rows, 0, 0
    return units


def _parquet_pieces(path: Path) -> tuple[list[str], list[tuple[int, int]]]:
    metadata = pq.ParquetFile(path).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return list(metadata.schema.to_arrow_schema().names), [(g.num_rows, g.total_byte_size) for g in groups]


def _stream_pieces(path: Path) -> tuple[list[str], list[tuple[int, int]]]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return list(reader.schema.names), [(batch.num_rows, batch.nbytes) for batch in reader]


def _tree_units(paths: Sequence[Path], unit_bytes: int) -> list[Unit]:
    units: list[Unit] = []
    group: list[str] = []
    held = 0
    for index, path in enumerate(paths, start=1):
        group.append(str(path))
        held += path.stat().st_size
        if held >= unit_bytes or index == len(paths):
            units.append(Unit("files", tuple(group), 0, len(group), 0, held))
            group, held = [], 0
    return units


def _lines(path: str, start: int, stop: int) -> Iterator[bytes]:
    """The lines whose first byte lies in [start, stop); a negative stop is the end of a compressed file."""
    if stop < 0:
        with pa.input_stream(path, compression="detect") as stream:
            yield from _whole_lines(io.BufferedReader(stream))
        return
    with Path(path).open("rb") as file:
        if start:  # a line that begins before the unit belongs to the unit before
            file.seek(start - 1)
            file.readline()
        while file.tell() < stop and (line := file.readline()):
            yield line


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline():
        yield line


def _table_batches(unit: Unit, columns: Columns) -> Iterator[pa.RecordBatch]:
    path = unit.paths[0]
    if unit.kind == "parquet":
        groups = list(range(unit.start, unit.stop))
        yield from pq.ParquetFile(path).iter_batches(_TABLE_ROWS, row_groups=groups, columns=columns.wanted)
        return
    with pa.memory_map(path) as file, pa.ipc.open_stream(file) as reader:
        for index, batch in enumerate(reader):
            if unit.start <= index < unit.stop:
                for first in range(0, batch.num_rows, _TABLE_ROWS):
                    yield batch.slice(first, _TABLE_ROWS)


def _file_row(path: str) -> Row:
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        return Row(path, 1, "", "", f"unreadable: {error.strerror}")
    except UnicodeDecodeError:
        return Row(path, 1, "", "", "not UTF-8")
    if "\0" in text:
        return Row(path, 1, "", "", "a NUL byte: not a text file")
    return _checked(path, 1, "", text, Columns("text", ""))


def _json_row(path: str, number: int, line: bytes, columns: Columns) -> Row:
    if not line.strip():
        return Row(path, number, "", "", "an empty line")
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(path, number, "", "", f"not JSON: {error}"[:160])
    if not isinstance(values, dict):
        return Row(path, number, "", "", f"a JSON {type(values).__name__}, not an object")
    if missing := [name for name in columns.wanted if name not in values]:
        return Row(path, number, "", "", f"no key {missing[0]!r}")
    prompt = values[columns.prompt] if columns.prompt else ""
    return _checked(path, number, prompt, values[columns.text], columns)


def _checked(path: str, number: int, prompt: Any, text: Any, columns: Columns) -> Row:
    for name, value in ((columns.text, text), (columns.prompt, prompt)):
        if not isinstance(value, str):
            return Row(path, number, "", "", f"{name!r} is {type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError:
            return Row(path, number, "", "", f"{name!r} holds half of a surrogate pair")
    if not text:
        return Row(path, number, "", "", f"{columns.text!r} is empty")
    return Row(path, number, prompt, text)
