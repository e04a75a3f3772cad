"""One model on one rank and on several: `python bench/tensor_parallel.py`, ranks with a thread each.

A random block-causal model of SDAR's form with about 100 M parameters, requests of fixed length at a fixed number of tokens a
step, so that both engines run the same forwards. They take turns (ABBA) in one process, which is rank 0; the other ranks
are processes of their own that wait while one rank works. The ratio says something only where every rank has a core.

Writes bench/results/tensor-parallel.json: committed tokens a second of each, their ratio, milliseconds of a step of several
ranks, and the memory that loading takes: the whole model's weights and peak, and each rank's. Fills docs/serving.md, but not from a
machine that had more to do than it has cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from documents import fill
from small_checkpoints import CONFIGS, write_small

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.ranks import Ranks
from fewstep.actors.engine.rendezvous import MeetingPoint, Rendezvous
from fewstep.actors.engine.request import Request
from fewstep.actors.engine.sharded_model import end, follow, load_sharded
from fewstep.kernels.model.checkpoint import load_model
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.records import DecodePolicy, WeightVersion

RESULTS = Path(__file__).resolve().parent / "results" / "tensor-parallel.json"
DOCS = RESULTS.parents[2] / "docs" / "serving.md"
MIB = 2**20
MODEL = CONFIGS["sdar"] | {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
VERSION = WeightVersion("bench", 0, "0")
DEADLINE_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="requests denoised together")
    parser.add_argument("--tokens", type=int, default=64, help="of each request")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of measurements")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_small(Path(temporary) / "model", MODEL, dtype=getattr(torch, arguments.dtype))
        memory = {"whole": _load_memory(folder)}
        memory |= {f"rank {r}": _load_memory(folder, r, arguments.ranks) for r in range(arguments.ranks)}
        with _ranks(arguments.ranks) as ranks:
            found = _measure(folder, ranks, arguments)
    content = {
        **found,
        "load_memory": {"value": memory, "unit": "bytes"},
        "settings": {**vars(arguments), "model": {name: MODEL[name] for name in sorted(MODEL)}, "threads_a_rank": 1},
        "load_before": {"value": load, "unit": "processes, mean of a minute"},
        "machine": machine_info(),
        "commit": git_commit(),
    }  # fmt: skip
    atomic_write_text(RESULTS, json.dumps(content, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    if load > content["machine"]["cores"]:
        raise SystemExit(
            f"{DOCS.name} stays as it is: {load:.1f} processes wanted {content['machine']['cores']} cores before the measurement"
        )
    fill(DOCS, "tensor-parallel", sentence(content))


def sentence(content: dict[str, Any]) -> str:
    """The result in words, for docs/serving.md."""
    settings, machine, memory = content["settings"], content["machine"], content["load_memory"]["value"]
    held = [memory[f"rank {rank}"] for rank in range(settings["ranks"])]
    weights = ", ".join(f"{part['weights_bytes'] / MIB:.0f}" for part in held)
    peaks = ", ".join(f"{part['peak_bytes'] / MIB:.0f}" for part in held)
    return (
        f"{settings['ranks']} ranks over one: {content['ratio']['value']:.2f} times the tokens a second"
        f" (the median of {settings['rounds']} pairs, which go from {min(content['ratio']['pairs']):.2f} to"
        f" {max(content['ratio']['pairs']):.2f}), {content['step_ms']['value']:.0f} ms a step of"
        f" {settings['batch']} requests, one thread a rank. Loading takes {memory['whole']['weights_bytes'] / MIB:.0f} MiB of weights"
        f" ({memory['whole']['peak_bytes'] / MIB:.0f} at the peak) on one rank, {weights} MiB ({peaks}) on {settings['ranks']}."
        f" {machine['cpu']}, {machine['cores']} cores, {settings['dtype']}, load {content['load_before']['value']:.1f} before it;"
        f" commit `{content['commit'][:12]}`."
    )


def _measure(folder: Path, ranks: Ranks, arguments: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(folder)
    sharded = load_sharded(ranks, folder).model
    engines = [
        Engine(weights, tokenizer, max_sequences=arguments.batch, weight_version=VERSION, prefix_cache=False)
        for weights in (model, sharded)
    ]
    requests = [
        Request(
            f"r{index}",
            tuple(range(4 + index, 68 + index)),
            DecodePolicy(kind="static", tokens_per_step=1, seed=index),
            max_tokens=arguments.tokens,
            ignore_eos=True,
        )
        for index in range(arguments.batch)
    ]
    times: list[list[float]] = [[], []]
    for engine in engines:
        engine.generate(requests)
    for round_number in range(arguments.rounds):
        for which in (0, 1) if round_number % 2 == 0 else (1, 0):
            started = time.perf_counter()
            engines[which].generate(requests)
            times[which].append(time.perf_counter() - started)
            print(
                f"round {round_number + 1}: {1 + which * (ranks.num_ranks - 1)} ranks {times[which][-1]:.2f} s"
            )
    num_tokens = arguments.batch * arguments.tokens
    pairs = [one / other for one, other in zip(*times, strict=True)]
    steps = engines[1].forwards / (arguments.rounds + 1)
    return {
        "one_rank": {"value": num_tokens / statistics.median(times[0]), "unit": "committed tokens / s"},
        "ranks": {"value": num_tokens / statistics.median(times[1]), "unit": "committed tokens / s"},
        "ratio": {"value": statistics.median(pairs), "pairs": pairs, "unit": "1"},
        "step_ms": {"value": 1e3 * statistics.median(times[1]) / steps, "unit": "ms"},
    }


def _load_memory(folder: Path, *rank: int) -> dict[str, int]:
    script = Path(__file__).with_name("load_memory.py")
    dtype = json.loads((folder / "config.json").read_text())["torch_dtype"]
    words = [sys.executable, str(script), str(folder), dtype, *map(str, rank)]
    measured: dict[str, int] = json.loads(
        subprocess.run(words, capture_output=True, text=True, check=True).stdout
    )
    return measured


@contextmanager
def _ranks(num_ranks: int) -> Iterator[Ranks]:
    meeting = MeetingPoint("127.0.0.1", num_ranks, DEADLINE_S)
    spawn = multiprocessing.get_context("spawn")
    others = [
        spawn.Process(target=_follow, args=(meeting.place, r), daemon=True) for r in range(1, num_ranks)
    ]
    for process in others:
        process.start()
    ranks = Ranks(meeting.place, 0, listener=meeting.detach())
    try:
        yield ranks
    finally:
        end(ranks)
        for process in others:
            process.join()


def _follow(place: Rendezvous, rank: int) -> None:
    torch.set_num_threads(1)
    follow(place, rank)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
