"""Run comparisons: first the parity of each peer and mode in fp32, then the timed rounds, every engine in turn."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.side_by_side.parity import compare
from bench.side_by_side.plan import ADAPTERS, Comparison, Mode, Peer
from bench.side_by_side.process import AdapterError, AdapterProcess, Message
from bench.side_by_side.settings import Settings
from bench.side_by_side.store import Store

Say = Callable[[str], None]
REMOTE_CODE = ("configuration_llada.py", "modeling_llada.py")


@dataclass
class Machinery:
    """Where things are and what has been started.

    Attributes:
        peers, models, logs: folders; say: prints progress.
        processes: running adapters by (peer or "ours", format, dtype).
    """

    settings: Settings
    peers: Path
    models: Path
    logs: Path
    say: Say
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    processes: dict[tuple[str, str, str], AdapterProcess] = field(default_factory=dict)

    def ours(self, our_format: str, dtype: str) -> AdapterProcess:
        """Our adapter with those weights loaded."""
        return self._started(
            "ours", our_format, dtype, Path(sys.executable), "ours_adapter.py", self.models / our_format
        )

    def theirs(self, peer: Peer, dtype: str) -> AdapterProcess:
        """A peer's adapter with its weights loaded."""
        python = self.peers / peer.environment / "bin" / "python"
        folder = self.models / peer.format if peer.needs is None else self._with_modelling_code(peer)
        checkout = None if peer.checkout is None else str(self.peers / peer.checkout)
        return self._started(peer.name, peer.format, dtype, python, peer.script, folder, checkout)

    def _started(
        self,
        name: str,
        weights: str,
        dtype: str,
        python: Path,
        script: str,
        folder: Path,
        checkout: str | None = None,
    ) -> AdapterProcess:
        key = (name, weights, dtype)
        if key not in self.processes:
            process = AdapterProcess(
                name, python, ADAPTERS / script, self.logs / f"{name}.log", self.environment()
            )
            self.processes[key] = process
            loaded = process.ask(
                op="load",
                model=str(folder.resolve()),
                checkout=checkout,
                dtype=dtype,
                threads=self.settings.threads,
                mask_token_id=self.settings.model.mask_token_id,
                block_size=self.settings.block_size,
                max_sequences=max(self.settings.streams),
                sizes=self.settings.model.model_dump(),
                compile=self.settings.vllm_compile,
            )
            self.versions[name] = loaded["versions"]
        return self.processes[key]

    def _with_modelling_code(self, peer: Peer) -> Path:
        """The model folder with the modelling file that the published one carries, from a peer's checkout."""
        assert peer.needs is not None
        folder = self.models / f"{peer.format}-remote"
        folder.mkdir(exist_ok=True)
        for file in (self.models / peer.format).iterdir():
            if not (folder / file.name).exists():
                os.link(file, folder / file.name)
        for name in REMOTE_CODE:
            shutil.copyfile(self.peers / peer.needs / "llada" / "model" / name, folder / name)
        return folder

    def environment(self) -> dict[str, str]:
        """One thread count for every library, nothing from the network, caches that outlive the process."""
        threads, cache = str(self.settings.threads), str(self.models.parent.resolve() / "cache")
        return {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": cache,
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": cache + "/inductor",
            "VLLM_CACHE_ROOT": cache + "/vllm",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }

    def close(self, keep: Collection[tuple[str, str, str]] = ()) -> None:
        """End the adapters that are not in `keep`."""
        for key in [key for key in self.processes if key not in keep]:
            self.processes.pop(key).close()

    def drop(self, name: str) -> None:
        """End a peer's adapters after it failed."""
        for key in [key for key in self.processes if key[0] == name]:
            self.processes.pop(key).close()

    def request(self, mode: Mode, prompts: list[list[int]], max_tokens: int, trace: bool = False) -> Message:
        """A `generate` message."""
        settings = self.settings
        return {
            "op": "generate",
            "prompts": prompts,
            "max_tokens": max_tokens,
            "block_size": settings.block_size,
            "cache": mode.cache,
            "kind": mode.kind,
            "tokens_per_step": settings.tokens_per_step,
            "threshold": settings.threshold,
            "mask_token_id": settings.model.mask_token_id,
            "trace": trace,
        }

    def prompts(self, number: int, *key: object) -> list[list[int]]:
        """Random tokens that depend on the seed and `key` alone."""
        draw = random.Random(repr((self.settings.seed, *key)))
        ordinary = min(self.settings.model.eos_token_id, self.settings.model.mask_token_id)
        return [[draw.randrange(ordinary) for _ in range(self.settings.prompt_tokens)] for _ in range(number)]


def check_parity(machinery: Machinery, plan: list[Comparison], store: Store) -> None:
    """Fill the store with `parity/PEER/MODE` for every peer whose tokens compare."""
    jobs = [
        (peer, comparison.mode) for comparison in plan for peer in comparison.peers if peer.role == "tokens"
    ]
    answers: dict[Mode, Message] = {}
    for peer in dict.fromkeys(peer for peer, _ in jobs):
        modes = [
            mode for other, mode in jobs if other is peer and f"parity/{peer.name}/{mode.label}" not in store
        ]
        for mode in modes:
            try:
                value = _parity(machinery, peer, mode, answers)
            except AdapterError as error:
                machinery.say(f"parity  {peer.name:<16} {mode.label}: {error}")
                machinery.drop(peer.name)
                machinery.drop("ours")
                value = {"error": str(error)}
            store.put(f"parity/{peer.name}/{mode.label}", value)
        machinery.drop(peer.name)
    machinery.close()


def _parity(machinery: Machinery, peer: Peer, mode: Mode, answers: dict[Mode, Message]) -> Message:
    settings = machinery.settings
    prompts = machinery.prompts(mode.streams, "parity", mode.streams)
    message = machinery.request(mode, prompts, settings.parity_tokens, trace=True)
    if mode not in answers:
        answers[mode] = machinery.ours(mode.our_format, "float32").ask(**message)
    theirs = machinery.theirs(peer, "float32").ask(**message)
    threshold = settings.threshold if mode.kind == "threshold" else None
    parity = compare(answers[mode], theirs, mode.cache in ("prefix", "dual"), threshold, settings.block_size)
    machinery.say(
        f"parity  {peer.name:<16} {mode.label}: {parity.verdict}, {parity.fraction_equal:.1%} of the tokens equal"
    )
    return {"verdict": parity.verdict, **parity.as_dict()}


def measure(machinery: Machinery, plan: list[Comparison], store: Store) -> None:
    """Fill the store with `timed/MODE/PEER`; a peer without parity is not timed."""
    for index, comparison in enumerate(plan):
        mode, wanted = comparison.mode, []
        for peer in comparison.peers:
            parity = store[f"parity/{peer.name}/{mode.label}"] if peer.role == "tokens" else {"verdict": None}
            if parity.get("verdict", False) is not False and f"timed/{mode.label}/{peer.name}" not in store:
                wanted.append(peer)
        machinery.say(
            f"[{index + 1}/{len(plan)}] {mode.label}: {', '.join(peer.name for peer in wanted) or 'nothing left'}"
        )
        if wanted:
            _close_unused(machinery, plan[index:])
            try:
                found = time_mode(machinery, mode, wanted)
            except AdapterError as error:  # ours; without it this mode compares nobody
                machinery.say(f"        {error}")
                machinery.drop("ours")
                found = {peer.name: {"error": str(error)} for peer in wanted}
            for name, value in found.items():
                store.put(f"timed/{mode.label}/{name}", value)
    machinery.close()


def _close_unused(machinery: Machinery, rest: list[Comparison]) -> None:
    """Memory is for the engines that are still to run."""
    dtype = machinery.settings.dtype
    keep = {("ours", comparison.mode.our_format, dtype) for comparison in rest}
    keep |= {(peer.name, peer.format, dtype) for comparison in rest for peer in comparison.peers}
    machinery.close(keep)


def time_mode(machinery: Machinery, mode: Mode, peers: list[Peer]) -> dict[str, Message]:
    """Rounds of every peer and us, then our floor; by peer name, what was measured or why not.

    Round 0 is not counted: a first answer sets up what is set up once (compiled code, packed weights, memory).
    """
    settings = machinery.settings
    runs: dict[str, list[Message]] = {}
    failed: dict[str, Message] = {}
    ours, loads = [], []
    for round_number in range(settings.repeats + 1):
        for peer in peers:
            if peer.name not in failed:
                try:
                    process = machinery.theirs(peer, settings.dtype)
                    reply = _answer(
                        machinery, process, mode, mode.streams if peer.batches else 1, round_number
                    )
                except AdapterError as error:
                    machinery.say(f"        {error}")
                    machinery.drop(peer.name)
                    failed[peer.name] = {"error": str(error)}
                else:
                    runs.setdefault(peer.name, []).append(reply)
        if len(failed) == len(peers):
            return failed
        process = machinery.ours(mode.our_format, settings.dtype)
        ours.append(_answer(machinery, process, mode, mode.streams, round_number))
        loads.append(os.getloadavg()[0])
    floor = process.ask(op="measure")
    own = summary(ours[1:]) | {"floor_seconds": floor["seconds"], "floor_cpu_seconds": floor["cpu_seconds"]}
    return failed | {
        name: {"peer": summary(replies[1:]), "ours": own, "load_average": max(loads)}
        for name, replies in runs.items()
        if name not in failed
    }


def _answer(
    machinery: Machinery, process: AdapterProcess, mode: Mode, streams: int, round_number: int
) -> Message:
    """One timed run of one engine; every round has prompts of its own, the same for all."""
    settings = machinery.settings
    size = settings.block_size if round_number == 0 and streams > 1 else settings.max_tokens
    # Nobody's prompts come back: our engine would find their blocks in its prefix cache.
    prompts = machinery.prompts(streams, "timed", mode.label, round_number)
    reply = process.ask(**machinery.request(mode, prompts, size))
    if round_number:
        speed = streams * size / reply["seconds"]
        machinery.say(f"        {round_number}/{settings.repeats} {process.name:<16} {speed:9.1f} tok/s")
    return reply | {"num_tokens": streams * size, "max_tokens": size}


def summary(replies: list[Message]) -> dict[str, Any]:
    """Medians of a few runs of one engine.

    Returns:
        tok_s: tokens of all streams; tpf: tokens of one stream per forward; forwards: of a run.
    """
    seconds = median(reply["seconds"] for reply in replies)
    forwards = median(reply["forwards"] for reply in replies)
    return {
        "num_tokens": replies[0]["num_tokens"],
        "seconds": [reply["seconds"] for reply in replies],
        "median_seconds": seconds,
        "median_cpu_seconds": median(reply["cpu_seconds"] for reply in replies),
        "tok_s": replies[0]["num_tokens"] / seconds,
        "forwards_s": forwards / seconds,
        "forwards": forwards,
        "tpf": replies[0]["max_tokens"] / forwards,
        "rows_per_forward": median(reply["rows"] / reply["forwards"] for reply in replies),
    }


def run(machinery: Machinery, plan: list[Comparison], store: Store) -> None:
    """Parity, then speed; whatever happens, no adapter outlives this call."""
    with ExitStack() as stack:
        stack.callback(machinery.close)
        check_parity(machinery, plan, store)
        measure(machinery, plan, store)
