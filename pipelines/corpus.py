"""A prepared corpus: packed token sequences in Arrow files, memory-mapped, with their documents' boundaries.

corpus.json          what it was made of and with; written last, so a folder with it is whole
shard-00000.arrow    one row a sequence: tokens, and of each piece its length, prompt, document and whether it ends
shard-00000.json     counts of the shard and its bad rows
bad_rows.jsonl       file, row and reason of every row that is not in the corpus
tokenizer.json       the tokenizer
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from fewstep.pipelines.packing import Piece
from fewstep.platform.artifacts import atomic_file
from fewstep.platform.errors import CheckpointError

MANIFEST, TOKENIZER, BAD_ROWS = "corpus.json", "tokenizer.json", "bad_rows.jsonl"
FORMAT_VERSION = 1
BATCH_SEQUENCES = 256

SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("prompts", pa.list_(pa.int32())),
        ("documents", pa.list_(pa.int64())),
        ("complete", pa.list_(pa.bool_())),
    ]
)


def shard_name(index: int) -> str:
    """Name of a shard without its suffix."""
    return f"shard-{index:05d}"


@contextmanager
def shard_writer(path: Path) -> Iterator[ShardWriter]:
    """Writes one shard's sequences as they come; the file appears whole, when the block ends, or not at all.

    Raises:
        ResourceError: the disk is full.
    """
    with atomic_file(path) as temporary, pa.ipc.new_file(str(temporary), SCHEMA) as file:
        writer = ShardWriter(file)
        yield writer
        writer.flush()


class ShardWriter:
    """What `shard_writer` hands out; holds at most BATCH_SEQUENCES sequences."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._rows: list[list[Piece]] = []
        self.num_sequences = self.num_tokens = 0

    def add(self, pieces: list[Piece]) -> None:
        """Append a sequence."""
        self._rows.append(pieces)
        self.num_sequences += 1
        self.num_tokens += sum(len(piece.tokens) for piece in pieces)
        if len(self._rows) == BATCH_SEQUENCES:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._rows:
            return
        columns = [
            pa.array(
                [np.concatenate([piece.tokens for piece in row]) for row in self._rows], SCHEMA.types[0]
            ),
            pa.array([[len(piece.tokens) for piece in row] for row in self._rows], SCHEMA.types[1]),
            pa.array([[piece.num_prompt for piece in row] for row in self._rows], SCHEMA.types[2]),
            pa.array([[piece.document for piece in row] for row in self._rows], SCHEMA.types[3]),
            pa.array([[piece.complete for piece in row] for row in self._rows], SCHEMA.types[4]),
        ]
        self._file.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._rows = []


class Corpus:
    """A finished corpus, read by sequence number; shards are mapped when first asked for.

    Attributes:
        manifest: corpus.json.
        digest: SHA-256 of the content, whatever it was made by and from; the data's name in a lineage.

    Raises:
        CheckpointError: no corpus, an unfinished one, or one that lacks files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.digest: str = self.manifest["digest"]
        self._shards: list[dict[str, Any]] = [s for s in self.manifest["shards"] if s["num_sequences"]]
        self._ends = np.cumsum([shard["num_sequences"] for shard in self._shards]).tolist()
        self._readers: dict[int, Any] = {}
        for shard in self._shards:
            path = self.folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["num_bytes"]:
                raise CheckpointError(
                    str(path),
                    "missing or cut short",
                    f"{shard['num_bytes']} bytes",
                    "run fewstep prepare again",
                )

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def __getitem__(self, index: int) -> list[Piece]:
        """The pieces of a sequence; raises IndexError behind the end."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        within = index - (self._ends[shard - 1] if shard else 0)
        batch = self._reader(shard).get_batch(within // BATCH_SEQUENCES)
        row = {name: batch.column(name)[within % BATCH_SEQUENCES].values for name in SCHEMA.names}
        tokens = row["tokens"].to_numpy()
        ends = np.cumsum(row["lengths"].to_numpy())
        rest = zip(*(row[name].to_pylist() for name in ("prompts", "documents", "complete")), strict=True)
        pieces = zip(np.split(tokens, ends[:-1]), rest, strict=True)
        return [Piece(part, *facts) for part, facts in pieces]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with."""
        return Tokenizer.from_file(str(self.folder / TOKENIZER))

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            path = self.folder / self._shards[shard]["file"]
            self._readers[shard] = pa.ipc.open_file(pa.memory_map(str(path)))
        return self._readers[shard]


def read_manifest(folder: Path) -> dict[str, Any]:
    """corpus.json. Raises CheckpointError where there is none, or one that cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = any(folder.glob("shard-*"))
        raise CheckpointError(
            str(folder),
            "an unfinished corpus" if unfinished else f"no {MANIFEST}",
            "a folder that fewstep prepare finished",
            "run fewstep prepare again" if unfinished else "run fewstep prepare, or check the path",
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            str(path), f"unreadable ({error})", "corpus.json", "prepare it again"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            str(path), f"version {version}", f"version {FORMAT_VERSION}", "prepare it again"
        )
    return manifest
