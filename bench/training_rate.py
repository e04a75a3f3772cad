"""A training step against its own matrix products: `python bench/training_rate.py`, a few minutes on one core.

One rank, one thread. A step is `TrainerRank.update`: rows in, forward, backward, DeepSpeed's optimiser. Its matrix products
(kernels/model/flops.py: `products`; each forward, its gradient by input and by weight) are timed alone on tensors of the same
shapes and dtype. Steps and products take turns; medians; the ratio is products' seconds over the step's, which is the share
of the products' FLOP rate that the step reaches. Writes bench/results/training-rate.json and the table in docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.actors.trainer_rank import TrainerRank
from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.kernels.model.checkpoint import embedded_model
from fewstep.kernels.model.config import ModelConfig, Precision
from fewstep.kernels.model.flops import Product, products, training_flops
from fewstep.kernels.rows import RowBatch, SampleRows
from fewstep.pipelines.corruption import Sample, mask_states
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.rng import generator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/training-rate.json"
OBJECTIVE = "fewstep.pipelines.objectives.denoise:Denoise"
GOAL = 0.7
HUNDRED = ModelConfig(
    vocab_size=32_000, hidden_size=640, num_hidden_layers=14, num_attention_heads=10, num_key_value_heads=10, head_dim=64,
    intermediate_size=1792, max_position_embeddings=2048, block_size=16, mask_token_id=2, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and a batch: `samples` texts of `length` tokens, half of each a prompt, each with a masked state and its complement."""

    name: str
    config: ModelConfig
    initial: Path | int
    samples: int
    length: int


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny = embedded_model()
    cases = (
        Case("tiny (0.86 M)", ModelConfig.load(tiny), tiny, 32, 96),
        Case("100 M", HUNDRED, 0, 4, 256),
    )
    rows = [
        measured(case, precision, compiled, arguments.rounds)
        for case in cases
        for precision in arguments.precisions
        for compiled in (False, True)
    ]
    result = {
        "rows": rows, "goal": GOAL, "settings": {"threads": 1, "ranks": 1, "rounds": arguments.rounds, "value": "median"},
        "machine": machine_info(), "commit": git_commit(),
    }  # fmt: skip
    atomic_write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    if arguments.out == RESULTS:
        from bench.documents import fill

        fill(ROOT / "docs/training.md", "training-rate", table(result))
    return 0


def measured(case: Case, precision: Precision, compiled: bool, rounds: int) -> dict[str, Any]:
    """Seconds of a step and of its products, by turns."""
    samples = batch(case)
    rows = RowBatch.collate(list(samples))
    targets = int((rows.targets >= 0).sum())
    settings = TrainerSettings(precision=precision, compiled=compiled, micro_rows=1 << 20)
    rank = TrainerRank(case.config, case.initial, settings, OBJECTIVE, {})
    rank.connect(0, *rank.endpoint())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    alone = [Timed(product, dtype) for product in products(case.config, rows.tokens.size, targets)]
    for _ in range(2):  # compiles, and lets the optimiser allocate
        rank.update(samples, 1e-4)
    steps, matrices = [], []
    for _ in range(rounds):
        matrices.append(sum(one.seconds() for one in alone))
        started = time.perf_counter()
        rank.update(samples, 1e-4)
        steps.append(time.perf_counter() - started)
    step, product_s = statistics.median(steps), statistics.median(matrices)
    row = {
        "model": case.name, "precision": precision, "compiled": compiled, "rows": rows.num_rows, "padded_rows": rows.tokens.size,
        "targets": targets, "step_s": step, "products_s": product_s, "ratio": product_s / step, "unit": "share of the products' rate",
        "step_gflop_per_s": training_flops(case.config, rows.num_rows, targets, rows.num_pairs) / step / 1e9,
        "products_gflop_per_s": 3 * sum(one.product.flops for one in alone) / product_s / 1e9,
    }  # fmt: skip
    print(
        f"{case.name:<14} {precision} {'compiled' if compiled else 'eager':<9} step {step:.3f} s  products {product_s:.3f} s"
        f"  ratio {row['ratio']:.2f}",
        flush=True,
    )
    return row


def batch(case: Case) -> Sequence[SampleRows]:
    """Random texts, masked as in pre-training."""
    draws = generator("training-rate", case.name)
    found = []
    for _ in range(case.samples):
        tokens = draws.integers(3, case.config.vocab_size, case.length).astype(np.int64)
        sample = Sample(tokens, case.length // 2)
        rows = SampleRows.clean(tokens)
        mask_states(
            sample, rows, block_size=16, mask_token=case.config.mask_token_id, rates=(0.1, 1.0), complementary=True, draws=draws
        )  # fmt: skip
        rows.weights /= case.samples * case.length
        found.append(rows)
    return found


class Timed:
    """One product and its two gradients, on tensors of its own."""

    def __init__(self, product: Product, dtype: torch.dtype) -> None:
        self.product = product
        self._x = torch.randn(product.rows, product.inner).to(dtype)
        self._weight = torch.randn(product.outer, product.inner).to(dtype)
        self._gradient = torch.randn(product.rows, product.outer).to(dtype)

    def seconds(self) -> float:
        """Of all `count` of them; the median of three, times the count."""
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            torch.mm(self._x, self._weight.T)
            torch.mm(self._gradient, self._weight)
            torch.mm(self._gradient.T, self._x)
            taken.append(time.perf_counter() - started)
        return self.product.count * statistics.median(taken)


def table(result: Mapping[str, Any]) -> str:
    """The rows in Markdown."""
    lines = ["| model | precision | | step | products alone | ratio |", "|---|---|---|---:|---:|---:|"]
    lines += [
        f"| {row['model']} | {row['precision']} | {'compiled' if row['compiled'] else 'eager'} | {1e3 * row['step_s']:.0f} ms,"
        f" {row['step_gflop_per_s']:.0f} GFLOP/s | {1e3 * row['products_s']:.0f} ms | {row['ratio']:.2f} |"
        for row in result["rows"]
    ]
    measured_with = (
        f"`python bench/training_rate.py`, one thread, {result['machine']['cpu']}, commit {result['commit'][:9]};"
        f" the goal is {result['goal']}."
    )
    return "\n".join([*lines, "", measured_with])


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.exit(main())
