"""Our logits beside the peers' own modelling code: `python bench/parity.py FAMILY|all --peer CHECKOUT`.

Runs in an environment with transformers 4.57.6 and einops besides this package (`pip install --no-deps -e .`). One small
random checkpoint in the family's real format is loaded by both. The peer then saves it with its own writer; that
folder is loaded, compared and saved by us, and must come back byte for byte. bf16 rows are compared with the peer's
float32 logits of the same bf16 weights too: two roundings differ from each other by about the sum of their own errors.

Writes one row per dtype into bench/results/parity.json and exits with 1 where a bound is passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peer_models import PEERS, Peer, load_weights
from small_checkpoints import CONFIGS, MASK, VOCAB_SIZE, write_small

from fewstep.kernels.attention import visibility
from fewstep.kernels.model.checkpoint import load_model, save_model
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info

RESULTS = Path(__file__).resolve().parent / "results" / "parity.json"
LENGTHS = (9, 24, 33, 50)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# float32: rounding of two orders of summation. bfloat16: ours may be at most this many times as far as the peer is
# from the float32 logits of the same weights.
MAX_FLOAT32_ERROR, MAX_BFLOAT16_RATIO = 5e-4, 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=["all", *PEERS])
    parser.add_argument(
        "--peer",
        type=Path,
        help="checkout of the family's repository; for `all` the folder of OWNER/NAME checkouts",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for family in PEERS if arguments.family == "all" else [arguments.family]:
        repository = PEERS[family].repository
        if repository and arguments.peer is None:
            parser.error(f"{family} needs --peer, a checkout of {repository}")
        checkout = arguments.peer / repository if repository and arguments.family == "all" else arguments.peer
        for dtype in DTYPES:
            rows.append(compare(family, checkout if repository else None, dtype))
            print(json.dumps(rows[-1]), flush=True)
    _merge(rows)
    return int(not all(row["passed"] for row in rows))


def compare(family: str, checkout: Path | None, dtype_name: str) -> dict[str, Any]:
    """One row: both directions of the format, and the logits."""
    peer, dtype = PEERS[family], DTYPES[dtype_name]
    with tempfile.TemporaryDirectory() as scratch:
        ours_written = write_small(Path(scratch) / "written", CONFIGS[family], dtype=dtype)
        theirs = load_weights(peer, checkout, ours_written, dtype)
        theirs_written = _saved_by_peer(theirs, ours_written, Path(scratch) / "peer")
        model, tokenizer = load_model(theirs_written)
        copy = Path(scratch) / "copy"
        save_model(copy, model.state_dict(), model.config, tokenizer, source=theirs_written)
        identical = _files(copy) == _files(theirs_written)
        exact = load_weights(peer, checkout, ours_written, torch.float32)
        errors = _errors(model, theirs, exact, peer)
    bound = (
        errors["logits_max_error"] <= MAX_FLOAT32_ERROR
        if dtype == torch.float32
        else errors["our_rms_error"] <= MAX_BFLOAT16_RATIO * errors["peer_rms_error"]
    )
    return {
        "family": family,
        "reference": _reference(peer, checkout),
        "dtype": dtype_name,
        **{key: float(f"{value:.3g}") for key, value in errors.items()},
        "roundtrip_identical": identical,
        "passed": bool(bound and identical),
        "torch": torch.__version__,
        "machine": machine_info(),
        "commit": git_commit(),
    }


def _errors(ours: Transformer, theirs: Any, exact: Any, peer: Peer) -> dict[str, float]:
    """Largest distance from the peer; root mean square distance of both from the peer's float32 logits."""
    largest, our_squares, peer_squares, count = 0.0, 0.0, 0.0, 0
    generator = torch.Generator().manual_seed(1)
    kept = torch.arange(VOCAB_SIZE) != MASK  # our head never answers with the mask token
    for length in LENGTHS:
        tokens = torch.randint(3, VOCAB_SIZE, (1, length), generator=generator)
        tokens[torch.rand(tokens.shape, generator=generator) < 0.4] = MASK
        positions = torch.arange(length)[None]
        visible = visibility(positions, torch.zeros_like(positions), ours.config.sees_block)
        with torch.no_grad():
            found = ours.logits(ours(tokens, positions, masked_attention(visible)))[0].float()[:, kept]
            expected = peer.forward(theirs, tokens, visible[0]).float()[:, kept]
            truth = peer.forward(exact, tokens, visible[0]).float()[:, kept]
        largest = max(largest, (found - expected).abs().max().item())
        our_squares += (found - truth).pow(2).sum().item()
        peer_squares += (expected - truth).pow(2).sum().item()
        count += truth.numel()
    return {
        "logits_max_error": largest,
        "our_rms_error": (our_squares / count) ** 0.5,
        "peer_rms_error": (peer_squares / count) ** 0.5,
    }


def _saved_by_peer(model: Any, source: Path, folder: Path) -> Path:
    """The peer's own `save_pretrained`, with the tokenizer beside it."""
    model.save_pretrained(str(folder), max_shard_size="40KB", safe_serialization=True)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _reference(peer: Peer, checkout: Path | None) -> str:
    if checkout is None:
        return f"transformers {transformers.__version__}"
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    )
    return f"{peer.repository}@{head.stdout.strip()}, transformers {transformers.__version__}"


def _merge(rows: list[dict[str, Any]]) -> None:
    found = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    merged = {(row["family"], row["dtype"]): row for row in [*found, *rows]}
    ordered = sorted(merged.values(), key=lambda row: (list(PEERS).index(row["family"]), row["dtype"]))
    atomic_write_text(RESULTS, json.dumps({"rows": ordered}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
