"""A corpus: the same documents from every format, whatever the number of processes and however often it was killed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.small_checkpoints import CONFIGS, write_small

from fewstep.__main__ import main
from fewstep.pipelines.corpus import Corpus
from fewstep.pipelines.packing import Packer, Piece, cut
from fewstep.pipelines.prepare import run
from fewstep.pipelines.prepare_settings import PrepareConfig
from fewstep.platform.errors import CheckpointError, ConfigError
from fewstep.platform.rng import generator

TEXTS = [f"def f{n}(xs):\n    return {'xs + ' * (n % 7)}[{n}]  # é\n" for n in range(200)]
SMALL_SHARD_MB = 0.002


def write_source(kind: str, folder: Path, texts: Sequence[str]) -> Path:
    """The texts in one format, the path that `sources` names."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts))
    table = pa.table({"n": list(range(len(texts))), "text": list(texts)})
    if kind == "jsonl":
        (folder / "a.jsonl").write_text(lines)
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.zst":
        with pa.output_stream(str(folder / "a.jsonl.zst"), compression="zstd") as file:
            file.write(lines.encode())
    elif kind == "parquet":
        pq.write_table(table, folder / "a.parquet", row_group_size=30)
    elif kind == "datasets":  # as Dataset.save_to_disk writes: an Arrow stream and a state.json that names it
        name = "data-00000-of-00001.arrow"
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": None}))
    else:
        for number, text in enumerate(texts):
            (folder / f"{number:05d}.py").write_text(text)
    return folder


def documents(corpus: Corpus) -> list[str]:
    """The text of every document, cut ones joined, in the order of the sources."""
    found: dict[tuple[int, int], list[int]] = {}
    shard_of = [i for i, s in enumerate(corpus.manifest["shards"]) for _ in range(s["num_sequences"])]
    for index in range(len(corpus)):
        for piece in corpus[index]:
            found.setdefault((shard_of[index], piece.document), []).extend(piece.tokens.tolist())
    eos, tokenizer = corpus.manifest["eos_token_id"], corpus.tokenizer()
    for ids in found.values():
        assert ids.count(eos) == 1
        assert ids[-1] == eos
    return [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in sorted(found.items())]


def config_of(source: Path, out: Path, **changes: Any) -> PrepareConfig:
    return PrepareConfig.model_validate(
        {
            "sources": source,
            "out": out,
            "sequence_tokens": 64,
            "shard_mb": SMALL_SHARD_MB,
            "workers": 1,
            **changes,
        }
        | {"sources": [str(source)]}
    )


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "datasets", "files"])
def test_every_format_gives_the_same_documents(kind: str, tmp_path: Path) -> None:
    source = write_source(kind, tmp_path / "source", TEXTS)
    run(config_of(source, tmp_path / "out"))
    corpus = Corpus(tmp_path / "out")
    assert documents(corpus) == TEXTS
    assert corpus.manifest["num_documents"] == len(TEXTS)
    assert corpus.manifest["num_bad_rows"] == 0
    assert len(corpus.manifest["shards"]) > 1 or kind in ("jsonl.gz", "jsonl.zst")
    assert all(sum(len(piece.tokens) for piece in corpus[n]) <= 64 for n in range(len(corpus)))


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    source = write_source("jsonl", tmp_path / "source", TEXTS)
    digests = []
    for workers in (1, 3):
        run(config_of(source, tmp_path / f"out{workers}", workers=workers))
        digests.append(Corpus(tmp_path / f"out{workers}").digest)
    assert digests[0] == digests[1]


def test_prompts_are_marked_and_bad_rows_are_listed_by_file_and_row(tmp_path: Path) -> None:
    rows: list[str] = [json.dumps({"prompt": f"# {n}\n", "text": "x = 1\n" * 3}) for n in range(60)]
    bad = {7: "{", 20: '{"text": "a"}', 21: '{"prompt": "", "text": 3}', 40: "[]", 41: "",
           59: '{"prompt": "", "text": "\\ud800"}', 60: '{"prompt": "p", "text": ""}'}  # fmt: skip
    for number, line in bad.items():
        rows[number - 1] = line
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    run(config_of(path, tmp_path / "out", prompt_column="prompt", shard_mb=0.0005))
    corpus = Corpus(tmp_path / "out")
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["row"]) for entry in listed] == [
        (str(path), number) for number in sorted(bad)
    ]
    for entry, reason in zip(
        listed, ("not JSON", "'prompt'", "int", "list", "empty line", "surrogate", "empty"), strict=True
    ):
        assert reason in entry["reason"]
    assert corpus.manifest["num_documents"] == 60 - len(bad)
    assert len(corpus.manifest["shards"]) > 2
    tokenizer = corpus.tokenizer()
    for piece in (piece for n in range(len(corpus)) for piece in corpus[n]):
        assert tokenizer.decode(piece.tokens[: piece.num_prompt].tolist()).startswith("# ")
        assert tokenizer.decode(piece.tokens[piece.num_prompt :].tolist()) == "x = 1\n" * 3


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_a_killed_job_goes_on_with_the_shards_it_has(tmp_path: Path) -> None:
    source = write_source("jsonl", tmp_path / "source", TEXTS * 60)
    whole, out = config_of(source, tmp_path / "whole"), config_of(source, tmp_path / "out")
    run(whole)
    keys = [f"{name}={value}" for name, value in out.model_dump(mode="json", exclude={"sources", "suffixes"}).items()
            if value != ""]  # fmt: skip
    job = subprocess.Popen(
        [sys.executable, "-m", "fewstep", "prepare", f"sources={source}", *keys], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(out.out.glob("shard-*.json")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = children_of(job.pid)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert job.returncode == -signal.SIGKILL
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "a worker outlived its parent"
    assert gone
    kept = {path: path.stat().st_mtime_ns for path in out.out.glob("shard-*.json")}
    assert kept
    assert not (out.out / "corpus.json").exists()
    with pytest.raises(CheckpointError, match="unfinished"):
        Corpus(out.out)
    run(out)
    assert Corpus(out.out).digest == Corpus(whole.out).digest
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_other_sources_under_a_begun_corpus_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source("jsonl", tmp_path / "source", TEXTS[:20])
    config = config_of(source, tmp_path / "out")
    run(config)
    run(config)
    assert "finished already" in capsys.readouterr().out
    os.utime(source / "a.jsonl", ns=(1, 1))
    with pytest.raises(ConfigError, match="resume=false"):
        run(config)
    run(config.model_copy(update={"resume": False}))


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["prepare", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source("parquet", tmp_path / "source", TEXTS[:5])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    base = [f"out={tmp_path / 'out'}", "workers=1"]
    assert "check the path" in one_line([*base, "sources=missing"], capsys)
    assert "n, text" in one_line([*base, f"sources={source}", "text_column=body"], capsys)
    assert "at least one document" in one_line([*base, f"sources={empty}"], capsys)
    (tmp_path / "none").mkdir()
    assert "at least one document" in one_line([*base, f"sources={tmp_path / 'none'}"], capsys)
    model = tmp_path / "model"
    write_small(model, CONFIGS["sdar"] | {"vocab_size": 80})
    assert "embedding" in one_line([*base, f"sources={source}", f"tokenizer={model}"], capsys)
    bare = model / "tokenizer.json"
    assert "eos_token" in one_line([*base, f"sources={source}", f"tokenizer={bare}"], capsys)


def pieces_of(lengths: Sequence[int], longest: int) -> Iterator[Piece]:
    for document, length in enumerate(lengths):
        yield from cut(np.full(length, document, np.int32), min(3, length), document, longest)


def test_packing_keeps_every_token_and_cuts_only_what_does_not_fit() -> None:
    lengths = generator("packing").integers(1, 200, 500).tolist()
    packer = Packer(100)
    packed = [s for piece in pieces_of(lengths, 100) for s in packer.add(piece)] + list(packer.rest())
    assert all(0 < sum(len(piece.tokens) for piece in sequence) <= 100 for sequence in packed)
    by_document: dict[int, list[Piece]] = {}
    for piece in (piece for sequence in packed for piece in sequence):
        by_document.setdefault(piece.document, []).append(piece)
    for document, length in enumerate(lengths):
        pieces = sorted(by_document[document], key=lambda piece: piece.complete)
        assert sum(len(piece.tokens) for piece in pieces) == length
        assert [piece.complete for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert len(pieces) == -(-length // 100)
    assert sum(lengths) / (100 * len(packed)) > 0.95
    assert all(a is not b for a, b in pairwise(packed))
