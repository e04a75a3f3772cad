"""Safetensors files of a model folder, one or several, read and written a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fewstep.platform.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Hugging Face's default at saving; a file system without large files still holds one.
MAX_SHARD_BYTES = 5_000_000_000
# A file stays mapped while it is read, and mapped pages count as resident: open it anew after this many bytes.
_MAPPED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: file name, shape, torch dtype."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardedTensors:
    """The tensors of a model folder: headers are read at once, data when iterated.

    Raises:
        CheckpointError: no safetensors file, an index that names a missing file or tensor, a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.index_text: str | None = None
        self.metadata: dict[str, dict[str, str]] = {}
        self.entries: dict[str, TensorEntry] = {}
        for file in self._files():
            self._read_header(file)
        if self.index_text is not None:
            self._check_index()

    @property
    def where(self) -> str:
        """The path to name in messages."""
        return str(self.folder / (SINGLE_FILE if self.index_text is None else INDEX_FILE))

    def read(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, or those wanted, in file order, as a view of its file: copy what is to stay. At most 64 MiB are
        mapped at a time (or the one tensor that is larger)."""
        for file in self.metadata:
            names = [
                name
                for name, entry in self.entries.items()
                if entry.file == file and (wanted is None or name in wanted)
            ]
            while names:
                with self._open(file) as reader:
                    budget = _MAPPED_BYTES
                    while names and budget > 0:
                        budget -= self.entries[names[0]].num_bytes
                        name = names.pop(0)
                        yield name, reader.get_tensor(name)

    def _files(self) -> list[str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            try:
                self.index_text = index.read_text()
                weight_map: dict[str, str] = json.loads(self.index_text)["weight_map"]
                return list(dict.fromkeys(weight_map.values()))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    str(index), f"unreadable ({error!r})", "an index with a weight_map", "copy it again"
                ) from error
        if not (self.folder / SINGLE_FILE).is_file():
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            raise CheckpointError(
                str(self.folder / SINGLE_FILE),
                f"no such file, but {pickled[0]}" if pickled else "no such file",
                f"a safetensors file, or {INDEX_FILE} and its shards",
                "save the weights as safetensors; pickles are not read" if pickled else "check the path",
            )
        return [SINGLE_FILE]

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if Path(file).name != file or not path.is_file():
            raise CheckpointError(str(path), "no such file", f"the shards that {INDEX_FILE} names", "copy it")
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                str(path), f"unreadable ({error})", "a whole safetensors file", "copy it again"
            ) from error

    def _read_header(self, file: str) -> None:
        with self._open(file) as reader:
            self.metadata[file] = reader.metadata() or {}
            for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                if name in self.entries:
                    raise CheckpointError(
                        f"{self.folder / file}: {name}",
                        f"also in {self.entries[name].file}",
                        "one copy",
                        "copy it again",
                    )
                view = reader.get_slice(name)
                dtype = _DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{self.folder / file}: {name}",
                        f"stored as {view.get_dtype()}",
                        f"one of {', '.join(_DTYPES)}",
                        "use the checkpoint before quantisation",
                    )
                self.entries[name] = TensorEntry(file, tuple(view.get_shape()), dtype)

    def _check_index(self) -> None:
        weight_map: dict[str, str] = json.loads(self.index_text or "")["weight_map"]
        found = {name: entry.file for name, entry in self.entries.items()}
        wrong = sorted(
            name for name in weight_map.keys() | found.keys() if weight_map.get(name) != found.get(name)
        )
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"{self.where}: {name}",
                f"{weight_map.get(name, 'nowhere')} by the index, {found.get(name, 'nowhere')} in fact",
                "an index that fits its files",
                "copy the folder again",
            )


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensor: Callable[[str], torch.Tensor],
    like: ShardedTensors | None = None,
) -> list[Path]:
    """Write tensors as one file or several, holding one file's tensors at a time.

    Args:
        shapes: every tensor's shape and dtype, in the order in which shards fill.
        tensor: gives a tensor by name, contiguous, on the CPU.
        like: a folder of the same tensors whose split and metadata are kept; None = files of at most 5 GB.
    Returns:
        the files written, index included.
    """
    if like is not None:
        plan = {file: [n for n, e in like.entries.items() if e.file == file] for file in like.metadata}
    else:
        plan = _plan(shapes)
    written = []
    for file, names in plan.items():
        metadata = like.metadata[file] if like is not None else {"format": "pt"}
        save_file({name: tensor(name) for name in names}, str(folder / file), metadata=metadata or None)
        written.append(folder / file)
    text = like.index_text if like is not None else _index(plan, shapes)
    if text is not None:
        (folder / INDEX_FILE).write_text(text)
        written.append(folder / INDEX_FILE)
    return written


def _plan(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for name, (shape, dtype) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if groups[-1] and held + size > MAX_SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {_shard_name(i, groups): names for i, names in enumerate(groups)}


def _shard_name(index: int, groups: Sequence[Any]) -> str:
    return f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"


def _index(
    plan: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> str | None:
    if len(plan) == 1:
        return None
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())
    weight_map = {name: file for file, names in plan.items() for name in names}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"
