"""How fast a corpus is prepared: `python bench/prepare.py [--gb 1]`, on a corpus generated for it.

JSONL of programs of the embedded family's kind, 2 kB a row, tokenised by a byte-pair tokenizer of 8,192 entries that is
trained on a part of it. Prepared with one process and with one for each core, in this order, twice; the median counts.
The peak memory is the sum over the job's processes of their resident sets, sampled. Writes bench/results/prepare.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fewstep.pipelines.corpus import Corpus
from fewstep.pipelines.tasks.family import draw_pair
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.rng import generator

RESULT = Path(__file__).resolve().parent / "results" / "prepare.json"
ROW_BYTES, DISTINCT_ROWS, VOCAB_SIZE, ROUNDS = 2000, 2000, 8192, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the corpus")
    parser.add_argument(
        "--folder", type=Path, help="where the corpus and the results go; default: a temporary one"
    )
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        num_rows = write_corpus(folder / "rows.jsonl", int(arguments.gb * 1e9))
        train_tokenizer(folder)
        num_bytes = (folder / "rows.jsonl").stat().st_size
        runs: dict[int, list[dict[str, float]]] = {count: [] for count in sorted({1, cores})}
        for index in range(ROUNDS):
            for workers, found in runs.items():
                found.append(measure(folder, folder / f"out-{index}-{workers}", workers))
                print(workers, "workers:", json.dumps(found[-1]), flush=True)
        manifests = [Corpus(path).manifest for path in sorted(folder.glob("out-*"))]
    rows = [
        {
            "workers": workers,
            "seconds": (seconds := statistics.median(run["seconds"] for run in found)),
            "rows_per_s": num_rows / seconds,
            "mb_per_s": num_bytes / 1e6 / seconds,
            "tokens_per_s": manifests[0]["num_tokens"] / seconds,
            "peak_memory_mib": max(run["peak_mib"] for run in found),
        }
        for workers, found in runs.items()
    ]
    content = {
        "rows": rows,
        "speed_up": rows[0]["seconds"] / rows[-1]["seconds"],
        "same_corpus": len({manifest["digest"] for manifest in manifests}) == 1,
        "settings": {"num_rows": num_rows, "num_bytes": num_bytes, "vocab_size": VOCAB_SIZE, "rounds": ROUNDS,
                     "fill": manifests[0]["fill"], "num_tokens": manifests[0]["num_tokens"]},
        "units": {"rows_per_s": "rows/s", "mb_per_s": "10^6 bytes of JSONL/s", "tokens_per_s": "tokens/s"},
        "machine": machine_info(),
        "commit": git_commit(),
    }  # fmt: skip
    atomic_write_text(RESULT, json.dumps(content, indent=2) + "\n")


def write_corpus(path: Path, size: int) -> int:
    """JSONL of about `size` bytes; returns the number of rows. Rows repeat after a few thousand, tokenizing does not
    notice: its cache is of words."""
    draws = generator("bench-prepare")
    pairs = ["".join(draw_pair(draws)) for _ in range(DISTINCT_ROWS * 4)]
    rows = []
    for index in range(DISTINCT_ROWS):
        text = ""
        while len(text) < ROW_BYTES:
            name = f"v{draws.integers(100_000)}"
            text += pairs[int(draws.integers(len(pairs)))].replace("xs", name) + "\n\n"
        rows.append(json.dumps({"id": index, "text": text}) + "\n")
    written = num_rows = 0
    with path.open("w") as file:
        while written < size:
            row = rows[num_rows % len(rows)]
            file.write(row)
            written += len(row)
            num_rows += 1
    return num_rows


def train_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with (folder / "rows.jsonl").open() as file:
        texts = [json.loads(file.readline())["text"] for _ in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def measure(folder: Path, out: Path, workers: int) -> dict[str, float]:
    """Seconds of the whole command, start-up included, and the peak memory of all its processes."""
    keys: dict[str, Any] = {
        "sources": folder / "rows.jsonl", "tokenizer": folder / "tokenizer.json", "eos_token": "<|end|>",
        "workers": workers, "out": out,
    }  # fmt: skip
    command = [sys.executable, "-m", "fewstep", "prepare", *(f"{key}={value}" for key, value in keys.items())]
    start = time.monotonic()
    job = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while job.poll() is None:
        processes = [job, *job.children(recursive=True)]
        held = 0
        for process in processes:
            try:
                held += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, held)
        time.sleep(0.05)
    if job.returncode:
        raise SystemExit(f"fewstep prepare ended with {job.returncode}")
    return {"seconds": time.monotonic() - start, "peak_mib": peak / 2**20}


if __name__ == "__main__":
    main()
