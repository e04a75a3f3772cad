"""dlmserve and ours over HTTP: equal weights, prompts, schedule and arrivals; latency at rising rates.

Both decode LLaDA's format in bf16 with one thread, `tokens_per_step` tokens a step, block by block. Capacity is what
dlmserve answers a second when it is never idle; both servers then get the same Poisson arrivals at 0.25, 0.5, 1 and 2
times it. They take turns, so that neither has the machine's better minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from bench.side_by_side.measure import REMOTE_CODE
from bench.side_by_side.settings import ModelSizes
from bench.side_by_side.weights import llada_state, write_model
from tokenizers import Tokenizer

from fewstep.cluster.deploy import ServeConfig, serve_model
from fewstep.cluster.loadtest import load
from fewstep.cluster.loadtest_settings import LoadtestConfig
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.errors import ResourceError
from fewstep.platform.ports import free_port
from fewstep.platform.rng import generator

SIZES = ModelSizes(
    hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=768, vocab_size=8192
)
RATES = (0.25, 0.5, 1.0, 2.0)
MAX_TOKENS, BLOCK, TOKENS_PER_STEP, PROMPT_TOKENS, NUM_PROMPTS = 64, 32, 4, 32, 64
CAPACITY_CLIENTS, READY_S = 8, 180.0
# The peer reads its settings at import, and its mask id is LLaDA-8B's as a constant and as a default argument.
LAUNCH = """
import sys, torch, uvicorn
torch.set_num_threads(1)
from dlmserve.models import llada
llada.MASK_ID = int(sys.argv[2])
assert llada.LoadedLLaDA.__init__.__defaults__ == (126336,)
llada.LoadedLLaDA.__init__.__defaults__ = (int(sys.argv[2]),)
from dlmserve.api.server import app
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


def measure(peers: Path | None, seconds: float) -> dict[str, Any]:
    """Rows of both servers at each rate.

    Args:
        peers: the folder that has dlmserve's environment, `venv-4`.
        seconds: of arrivals at each rate.
    Raises:
        ResourceError: it is not there.
    """
    python = peers / "venv-4" / "bin" / "python" if peers is not None else None
    if peers is None or python is None or not python.is_file() or not (peers / "Fast-dLLM").is_dir():
        raise ResourceError(
            "--peers",
            peers,
            "a folder with Fast-dLLM, and venv-4 that has dlmserve",
            "set it up as docs/benchmarks.md says",
        )
    with tempfile.TemporaryDirectory() as temporary:
        # dlmserve takes a folder for LLaDA by its name.
        folder = Path(temporary) / "llada"
        write_model(folder, "llada", SIZES, llada_state(SIZES, 0))
        for name in REMOTE_CODE:
            shutil.copyfile(peers / "Fast-dLLM" / "llada" / "model" / name, folder / name)
        prompts = Path(temporary) / "prompts.jsonl"
        atomic_write_text(prompts, _prompts(folder))
        ours_config = ServeConfig(model=str(folder), port=0, dtype="bfloat16", log={"file": "/dev/null"})
        with _dlmserve(python, folder) as (url, name), serve_model(ours_config) as ours:
            servers = {
                "dlmserve": _load(url, name, prompts, THEIRS),
                "fewstep": _load(ours.url, ours.model, prompts, OURS),
            }
            capacities = {server: _capacity(config) for server, config in servers.items()}
            rows = [
                _row(server, config, share, share * capacities["dlmserve"], seconds)
                for share in RATES
                for server, config in servers.items()
            ]
    return {
        "rows": rows,
        "capacity_requests_per_s": capacities,
        "settings": {
            "model": SIZES.model_dump(), "dtype": "bfloat16", "max_tokens": MAX_TOKENS, "block_size": BLOCK,
            "tokens_per_step": TOKENS_PER_STEP, "prompt_tokens": PROMPT_TOKENS, "seconds": seconds,
        },
    }  # fmt: skip


THEIRS = {"block_length": BLOCK, "num_denoising_steps": MAX_TOKENS // TOKENS_PER_STEP, "seed": 0}
OURS = {
    "temperature": 0,
    "fewstep": {"kind": "static", "tokens_per_step": TOKENS_PER_STEP, "block_size": BLOCK, "cache": "none"},
}


def _load(url: str, model: str, prompts: Path, fields: dict[str, Any]) -> LoadtestConfig:
    return LoadtestConfig(
        url=url, model=model, prompts=prompts, fields=fields, endpoint="chat", stream=False, max_tokens=MAX_TOKENS,
        timeout_s=600, clients=CAPACITY_CLIENTS, requests=4 * CAPACITY_CLIENTS,
    )  # fmt: skip


def _capacity(config: LoadtestConfig) -> float:
    load(config.model_copy(update={"requests": CAPACITY_CLIENTS}))  # the first requests pay for warming up
    report, _ = load(config)
    if report["errors"]:
        raise RuntimeError(f"not a measurement: {report['errors']}")
    return float(report["requests_per_s"])


def _row(server: str, config: LoadtestConfig, share: float, rate: float, seconds: float) -> dict[str, Any]:
    report, _ = load(config.model_copy(update={"loop": "open", "rate": rate, "seconds": seconds}))
    whole = report["request_s"] or {}
    return {
        "server": server, "of_capacity": share, "rate_per_s": rate, "requests": report["requests"],
        "answered": report["answered"], "error_share": report["error_share"], "p50_s": whole.get("p50"),
        "p95_s": whole.get("p95"), "committed_tokens_per_s": report["committed_tokens_per_s"],
        "errors": report["errors"],
    }  # fmt: skip


def _prompts(folder: Path) -> str:
    """JSON lines of random words of the vocabulary, all of one length in tokens."""
    import json

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    draws = generator(0, "peer prompts")
    lines = []
    for _ in range(NUM_PROMPTS):
        ids = draws.integers(0, SIZES.vocab_size - 8, PROMPT_TOKENS)
        lines.append(json.dumps({"prompt": " ".join(tokenizer.id_to_token(int(token)) for token in ids)}))
    return "\n".join(lines) + "\n"


@contextmanager
def _dlmserve(python: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """The peer's server in its own environment: its address and the model's name there."""
    port = free_port("127.0.0.1", 0)
    environment = {
        **os.environ, "DLMSERVE_MODEL": str(folder), "DLMSERVE_DTYPE": "bf16", "DLMSERVE_DEVICE": "cpu",
        "DLMSERVE_LOG_LEVEL": "error", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [str(python), "-c", LAUNCH, str(port), str(SIZES.mask_token_id)]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_S
        while not _ready(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("dlmserve did not come up")
            time.sleep(0.5)
        yield url, str(folder)
    finally:
        # It drains for as long as an answer is being made; nobody waits for those.
        server.kill()
        server.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
