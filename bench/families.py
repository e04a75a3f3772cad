"""What works with each public checkpoint format: `python bench/families.py`, one row a family.

For every family a small random checkpoint in its real format is loaded, denoised by the engine (tokens compared with a
plain loop over whole forwards), trained for a few steps, saved and loaded again. The distance of its logits from the
peer's own modelling code comes from bench/results/parity.json, which `bench/parity.py` writes in an environment that has
transformers; memory is that of a larger model, loaded in a process of its own. Writes bench/results/families.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_checkpoints import CONFIGS, MASK, tensor_shapes, write_small, write_weights

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request, check_model
from fewstep.kernels.attention import visibility
from fewstep.kernels.model.checkpoint import load_model, load_state, save_model, state_checksum
from fewstep.kernels.model.config import NO_TOKEN
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.kernels.rows import NO_TARGET, RowBatch, SampleRows
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.errors import CheckpointError
from fewstep.platform.records import DecodePolicy, WeightVersion

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT = (7, 3, 90, 14, 55)
MAX_TOKENS, NUM_STEPS, LEARNING_RATE = 13, 8, 1e-2
VERSION = WeightVersion("families", 0, "0" * 32)
MEMORY_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 40}


def main() -> None:
    torch.set_num_threads(1)
    parity = {
        (row["family"], row["dtype"]): row
        for row in json.loads((RESULTS / "parity.json").read_text())["rows"]
    }
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in CONFIGS:
            rows.append(measure(name, Path(scratch) / name, parity))
            print(json.dumps(rows[-1]), flush=True)
        loading = memory(Path(scratch) / "large")
    content = {
        "rows": rows,
        "loading": loading,
        "settings": {"prompt_tokens": len(PROMPT), "max_tokens": MAX_TOKENS, "train_steps": NUM_STEPS},
        "machine": machine_info(),
        "commit": git_commit(),
    }
    atomic_write_text(RESULTS / "families.json", json.dumps(content, indent=2) + "\n")


def measure(name: str, folder: Path, parity: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """One row: every value seen in this run but the peer's."""
    single, half = parity[name, "float32"], parity[name, "bfloat16"]
    write_small(folder, CONFIGS[name])
    trained, losses = trains(folder)
    return {
        "family": name,
        "reference": single["reference"],
        "logits_max_error": single["logits_max_error"],
        "dtype": "float32",
        "bfloat16": {key: half[key] for key in ("logits_max_error", "our_rms_error", "peer_rms_error")},
        "roundtrip_identical": all(
            roundtrip(name, folder, dtype) for dtype in (torch.float32, torch.bfloat16)
        ),
        "generates": generates(folder),
        "trains": trained,
        "loss_first_last": losses,
    }


def roundtrip(name: str, folder: Path, dtype: torch.dtype) -> bool:
    """Whether loading and saving gives back every file, byte for byte, single and sharded."""
    identical = True
    for sharded in (True, False):
        source = write_small(folder / f"{dtype}-{sharded}", CONFIGS[name], dtype=dtype, sharded=sharded)
        model, tokenizer = load_model(source)
        copy = folder / f"{dtype}-{sharded}-copy"
        save_model(copy, model.state_dict(), model.config, tokenizer, source=source)
        identical &= {p.name: p.read_bytes() for p in copy.iterdir()} == {
            p.name: p.read_bytes() for p in source.iterdir()
        }
    return identical


def generates(folder: Path) -> bool | str:
    """Whether the engine's tokens are the plain loop's; the engine's reason where it refuses the model."""
    model, tokenizer = load_model(folder)
    try:
        check_model(model.config)
    except CheckpointError as error:
        return f"refused: {error.got}"
    size = 4 if model.config.attention_kind == "bidirectional" else model.config.block_size
    policy = DecodePolicy(kind="static", block_size=size)
    request = Request("a", PROMPT, policy, max_tokens=MAX_TOKENS, ignore_eos=True)
    expected = plain_decode(model, size)
    engine = Engine(model, tokenizer, max_sequences=1, weight_version=VERSION)
    return bool(engine.generate([request])[0].completion_ids.tolist() == expected)


def plain_decode(model: Transformer, size: int) -> list[int]:
    """The most confident masked position of the live block, one a forward over everything."""
    end, whole = len(PROMPT) + MAX_TOKENS, model.config.attention_kind == "bidirectional"
    tokens = [*PROMPT, *([MASK] * MAX_TOKENS if whole else [])]
    for start in range(len(PROMPT) if whole else len(PROMPT) // size * size, end, size):
        stop = min(start + size, end) if whole else start + size
        tokens += [MASK] * (stop - len(tokens))
        while MASK in tokens[start:stop]:
            logprobs = _logits(model, tokens).log_softmax(-1)
            left = [p for p in range(start, stop) if tokens[p] == MASK]
            best = max(left, key=lambda p: (float(logprobs[p].max()), -p))
            tokens[best] = int(logprobs[best].argmax())
    return tokens[len(PROMPT) : end]


def _logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    positions = torch.arange(len(tokens))[None]
    visible = visibility(positions, torch.zeros_like(positions), model.config.sees_block)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([tokens]), positions, masked_attention(visible)))[0]
    return logits.roll(1, 0) if model.config.logit_shift else logits


def trains(folder: Path) -> tuple[bool, list[float]]:
    """Whether the loss falls, and what was learned survives saving and loading, bit for bit; first and last loss."""
    transformer, tokenizer = load_model(folder)
    model, config = TrainingModel(transformer.train()), transformer.config
    tokens = np.arange(16, dtype=np.int64) * 5 + 4
    target = (np.arange(16) % 3 != 0) & (np.arange(16) >= 4)
    rows = SampleRows.clean(tokens)
    rows.add_state(
        tokens if config.mask_token_id == NO_TOKEN else np.where(target, MASK, tokens),
        np.arange(16),
        np.where(target, tokens, NO_TARGET),
        target.astype(np.float32),
    )
    batch = RowTensors.of(
        RowBatch.collate([rows.states_only() if config.attention_kind == "bidirectional" else rows])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in range(NUM_STEPS):
        loss = -model(
            batch.tokens, batch.positions, batch.copies, batch.target_rows, batch.targets, config.sees_block
        )[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = transformer.state_dict()
    save_model(folder / "trained", state, config, tokenizer, source=folder)
    kept = state_checksum(load_state(folder / "trained", config)) == state_checksum(state)
    return bool(losses[-1] < 0.5 * losses[0] and kept), [round(losses[0], 3), round(losses[-1], 3)]


def memory(folder: Path) -> list[dict[str, Any]]:
    """Peak of loading a model of about a gigabyte, as stored and converted."""
    config = CONFIGS["sdar"] | MEMORY_SIZES
    write_small(folder, config | {"num_hidden_layers": 0}, dtype=torch.bfloat16, sharded=False)
    content = {**json.loads((folder / "config.json").read_text()), **MEMORY_SIZES}
    (folder / "config.json").write_text(json.dumps(content))
    shapes = tensor_shapes(config)
    write_weights(
        folder, {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, False
    )
    script = Path(__file__).with_name("load_memory.py")
    measured = []
    for dtype in ("bfloat16", "float32"):
        done = subprocess.run(
            [sys.executable, script, folder, dtype], capture_output=True, text=True, check=True
        )
        measured.append({"stored": "bfloat16", "loaded": dtype, **json.loads(done.stdout)})
    return measured


if __name__ == "__main__":
    main()
