"""`fewstep prepare`: text on disk becomes packed, tokenised sequences in sharded Arrow files.

The sources are cut into units, each unit becomes one shard, and a shard is a function of its unit alone: the corpus is
the same whatever the number of processes, and an interrupted job goes on with the shards it has not. Nothing larger
than a few hundred sequences and one document is ever held.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fewstep.kernels.model.config import NO_TOKEN, ModelConfig
from fewstep.pipelines.corpus import BAD_ROWS, FORMAT_VERSION, MANIFEST, TOKENIZER, shard_name, shard_writer
from fewstep.pipelines.models import model_folder
from fewstep.pipelines.packing import Packer, cut
from fewstep.pipelines.prepare_settings import PrepareConfig
from fewstep.pipelines.progress import read_progress, write_progress
from fewstep.pipelines.sources import Columns, Row, Unit, find_files, plan_units, read_rows
from fewstep.platform.artifacts import atomic_file, atomic_write_text, file_digest
from fewstep.platform.errors import CheckpointError, ConfigError, ResourceError

# Rows that are tokenised in one call: enough to make the call's cost vanish, few enough to be held.
_ROWS_PER_CALL, _CHARACTERS_PER_CALL = 256, 1 << 20
_REPORT_EVERY_S = 2.0
_MB = 1e6


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's file and what the corpus needs to know of it."""

    path: Path
    size: int
    eos: int
    mask: int
    """NO_TOKEN where the model has none."""


@dataclass(frozen=True)
class Shard:
    """What a worker is told: one unit and where its shard goes."""

    index: int
    unit: Unit
    out: Path
    columns: Columns
    eos: int
    longest: int


def run(config: PrepareConfig) -> None:
    """Prepare a corpus, or finish one; prints progress and ends with one line of counts.

    Raises:
        ConfigError: sources, columns or a tokenizer that cannot be used; a corpus without a single document; an `out`
            that holds a corpus of other sources or settings.
        ResourceError: a full disk, or a worker that was killed.
    """
    vocabulary = find_vocabulary(config)
    columns = Columns(config.text_column, config.prompt_column)
    files = find_files(config.sources, config.format, config.suffixes)
    fingerprint = _fingerprint(config, vocabulary, [path for _, path in files])
    shards = [
        Shard(index, unit, config.out, columns, vocabulary.eos, config.sequence_tokens)
        for index, unit in enumerate(plan_units(files, columns, int(config.shard_mb * _MB)))
    ]
    if not shards:
        raise _empty("no files with anything in them", config)
    if read_progress(config.out, fingerprint, resume=config.resume) is None:
        _start_over(config.out, fingerprint)
    elif (config.out / MANIFEST).is_file():
        print(f"{config.out} is finished already", flush=True)
        return
    _make(shards, config, vocabulary)
    manifest = _finish(shards, config, vocabulary, fingerprint)
    print(
        f"wrote {config.out}: {manifest['num_documents']} documents, {manifest['num_tokens']} tokens in"
        f" {manifest['num_sequences']} sequences ({manifest['fill']:.1%} full), {manifest['num_bad_rows']} bad rows"
        + (f", listed in {config.out / BAD_ROWS}" if manifest["num_bad_rows"] else ""),
        flush=True,
    )


def find_vocabulary(config: PrepareConfig) -> Vocabulary:
    """The tokenizer the configuration names, checked against the model beside it.

    Raises:
        ConfigError: no such tokenizer, no end token, or more tokens than the model's embedding has rows.
    """
    given = Path(config.tokenizer) if config.tokenizer else model_folder("", "")
    path = given / TOKENIZER if given.is_dir() else given
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception
        raise ConfigError(
            "tokenizer", f"{path} ({error})", "a model folder or a tokenizer.json", "check the path"
        ) from error
    size = tokenizer.get_vocab_size()
    model = ModelConfig.load(path.parent) if given.is_dir() else None
    if model is not None and size > model.vocab_size:
        raise ConfigError(
            "tokenizer",
            f"{size} tokens, and the embedding of {given} has {model.vocab_size} rows",
            "a tokenizer no larger than the embedding",
            "use the tokenizer the model was trained with",
        )
    eos = model.eos_token_id if model is not None else None
    if config.eos_token:
        eos = tokenizer.token_to_id(config.eos_token)
    if eos is None:
        raise ConfigError(
            "eos_token", repr(config.eos_token), f"a token of {path}", "name the token that ends a document"
        )
    return Vocabulary(path, size, eos, model.mask_token_id if model is not None else NO_TOKEN)


def make_shard(shard: Shard) -> dict[str, Any]:
    """One unit as one shard and its record, both on disk when this returns; runs in a worker."""
    counts = {"num_lines": 0, "num_documents": 0, "num_text_bytes": 0}
    bad: list[tuple[str, int, str]] = []
    path = shard.out / f"{shard_name(shard.index)}.arrow"
    packer = Packer(shard.longest)
    with shard_writer(path) as writer:
        rows = read_rows(shard.unit, shard.columns)
        for chunk in _chunks(_good_rows(rows, counts, bad)):
            for tokens, num_prompt in _encode(chunk, shard.eos):
                for piece in cut(tokens, num_prompt, counts["num_documents"], shard.longest):
                    for sequence in packer.add(piece):
                        writer.add(sequence)
                counts["num_documents"] += 1
        for sequence in packer.rest():
            writer.add(sequence)
    record = counts | {
        "file": path.name,
        "num_sequences": writer.num_sequences,
        "num_tokens": writer.num_tokens,
        "num_bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "bad_rows": bad,
    }
    # The record comes last: a shard without one was not finished.
    atomic_write_text(path.with_suffix(".json"), json.dumps(record))
    return record


def _good_rows(rows: Iterator[Row], counts: dict[str, int], bad: list[tuple[str, int, str]]) -> Iterator[Row]:
    for row in rows:
        counts["num_lines"] += 1
        if row.reason:
            bad.append((row.path, row.number, row.reason))
            continue
        counts["num_text_bytes"] += len(row.prompt.encode()) + len(row.text.encode())
        yield row


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    held = 0
    for row in rows:
        chunk.append(row)
        held += len(row.text) + len(row.prompt)
        if len(chunk) == _ROWS_PER_CALL or held >= _CHARACTERS_PER_CALL:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _encode(rows: Sequence[Row], eos: int) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.int32]], int]]:
    """Token ids of prompt, text and the end token, and how many are the prompt's."""
    texts = [text for row in rows for text in (row.prompt, row.text)]
    encoded = _tokenizer[0].encode_batch_fast(texts, add_special_tokens=False)
    for prompt, text in zip(encoded[::2], encoded[1::2], strict=True):
        before = prompt.ids
        yield np.array([*before, *text.ids, eos], np.int32), len(before)


# The worker's tokenizer: read once a process, not once a shard.
_tokenizer: list[Tokenizer] = []


def _start_worker(path: Path) -> None:
    # Ctrl-C is the parent's to handle; a worker finishes the shard it is at.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer[:] = [Tokenizer.from_file(str(path))]


def _end_with_parent() -> None:
    """A parent that is killed closes nothing, and its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(shards: Sequence[Shard], config: PrepareConfig, vocabulary: Vocabulary) -> None:
    """Every shard that is not there yet, several at a time."""
    left = [shard for shard in shards if _record(shard) is None]
    progress = _Progress(shards, left)
    workers = min(len(left), config.workers or len(os.sched_getaffinity(0))) or 1
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (vocabulary.path.resolve(),)
    )
    waiting, running = iter(left), dict[Future[dict[str, Any]], Shard]()
    try:
        while True:
            # Two shards a worker are handed out, so that none waits and an interruption leaves little to finish.
            for shard in islice(waiting, max(0, 2 * workers - len(running))):
                running[pool.submit(make_shard, shard)] = shard
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                progress.add(running.pop(done), done.result())
    except BrokenProcessPool as error:
        raise ResourceError(
            "workers",
            "a worker that was killed",
            "enough memory for each",
            "use fewer workers, and run again to go on",
        ) from error
    except KeyboardInterrupt:
        print("\nstopping after the shards at hand; the same command goes on from here", flush=True)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _record(shard: Shard) -> dict[str, Any] | None:
    """What a finished shard says of itself; None where it is not whole."""
    path = shard.out / f"{shard_name(shard.index)}.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    data = shard.out / record["file"]
    return record if data.is_file() and data.stat().st_size == record["num_bytes"] else None


def _finish(
    shards: Sequence[Shard], config: PrepareConfig, vocabulary: Vocabulary, fingerprint: str
) -> dict[str, Any]:
    """Bad rows by file and row, the tokenizer, and last the manifest."""
    records = []
    num_bad = 0
    with atomic_file(config.out / BAD_ROWS) as temporary, temporary.open("w") as file:
        before = 0
        for shard in shards:
            record = _record(shard)
            if record is None:
                raise CheckpointError(
                    str(config.out), f"no {shard_name(shard.index)}", "the shards just made", "run it again"
                )
            first = shard.unit.first_row
            before = before if first is None else first
            for path, number, reason in record.pop("bad_rows"):
                file.write(json.dumps({"file": path, "row": before + number, "reason": reason}) + "\n")
                num_bad += 1
            before += record["num_lines"]
            records.append(record)
    totals = {
        name: sum(record[name] for record in records)
        for name in ("num_documents", "num_tokens", "num_sequences", "num_text_bytes")
    }
    if not totals["num_documents"]:
        raise _empty(f"{num_bad} rows, all bad (see {config.out / BAD_ROWS})", config)
    atomic_write_text(config.out / TOKENIZER, vocabulary.path.read_text())
    manifest = {
        "version": FORMAT_VERSION,
        "digest": _digest(records, config.out / TOKENIZER),
        "fingerprint": fingerprint,
        "tokenizer": file_digest(config.out / TOKENIZER),
        "vocab_size": vocabulary.size,
        "eos_token_id": vocabulary.eos,
        "mask_token_id": vocabulary.mask,
        "sequence_tokens": config.sequence_tokens,
        **totals,
        "num_bad_rows": num_bad,
        "fill": totals["num_tokens"] / (totals["num_sequences"] * config.sequence_tokens),
        "settings": config.model_dump(mode="json", exclude={"out", "workers", "resume"}),
        "shards": records,
    }
    atomic_write_text(config.out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _digest(records: Sequence[dict[str, Any]], tokenizer: Path) -> str:
    digests = [record["sha256"] for record in records] + [file_digest(tokenizer)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _fingerprint(config: PrepareConfig, vocabulary: Vocabulary, files: Sequence[Path]) -> str:
    """Sources by name, size and time of change (a digest would read a large corpus twice), tokenizer by content."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = {
        "version": FORMAT_VERSION,
        "settings": config.model_dump(mode="json", exclude={"out", "workers", "resume"}),
        "tokenizer": file_digest(vocabulary.path),
        "eos": vocabulary.eos,
        "sources": stats,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _start_over(out: Path, fingerprint: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in (*out.glob("shard-*"), *out.glob(".shard-*"), out / MANIFEST, out / BAD_ROWS):
        path.unlink(missing_ok=True)
    write_progress(out, fingerprint, {})


def _empty(found: str, config: PrepareConfig) -> ConfigError:
    return ConfigError(
        "sources", found, "at least one document", f"check sources, suffixes and {config.text_column!r}"
    )


class _Progress:
    """A line every two seconds at most: share done, rows and MB a second, time left."""

    def __init__(self, shards: Sequence[Shard], left: Sequence[Shard]) -> None:
        self._total = sum(shard.unit.num_bytes for shard in shards)
        self._done = self._total - sum(shard.unit.num_bytes for shard in left)
        self._start = self._shown = time.monotonic()
        self._bytes = self._rows = 0
        if len(left) < len(shards):
            print(f"going on: {len(shards) - len(left)} of {len(shards)} shards are there", flush=True)

    def add(self, shard: Shard, record: dict[str, Any]) -> None:
        self._done += shard.unit.num_bytes
        self._bytes += shard.unit.num_bytes
        self._rows += record["num_lines"]
        now = time.monotonic()
        if now - self._shown < _REPORT_EVERY_S and self._done < self._total:
            return
        self._shown = now
        seconds = max(now - self._start, 1e-9)
        left = (self._total - self._done) * seconds / self._bytes
        print(
            f"{self._done / self._total:6.1%}  {self._rows} rows  {self._rows / seconds:.0f} rows/s"
            f"  {self._bytes / _MB / seconds:.1f} MB/s  {left:.0f} s left",
            flush=True,
        )
