"""Orders of opening: drawn by the model on known texts, scored by the path bound, the best kept in Parquet.

Constrained-order training (Seed Diffusion, 2508.02193, section on trajectories) fine-tunes on trajectories of high
likelihood. A trajectory of a known text x0 is drawn by *teacher-forced order sampling*: from all masks, the model's
confidence says which positions open and the text says what is written there. Its path bound

    S = 1/n · Σ_k Σ_{i opened at step k} log p(x0[i] | state k)   <=   1/n · log p(x0)        (per opened token)

is a lower bound on the log-likelihood up to the choice of the order. In a block-causal model earlier blocks are clean in
every state, so all blocks of a text are opened in the same forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from fewstep.kernels.attention import visibility
from fewstep.kernels.model.training import rows_before
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.pipelines.corruption import Sample
from fewstep.pipelines.distill_settings import PoolConfig
from fewstep.platform.artifacts import atomic_file
from fewstep.platform.rng import generator

SAMPLES_PER_PART = 32

SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("order", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("num_prompt", pa.int32()),
        ("step", pa.list_(pa.int16())),
        ("score", pa.float32()),
        ("num_steps", pa.int16()),
    ]
)


@dataclass(frozen=True)
class Order:
    """One trajectory of a known text.

    Attributes:
        sample, number: which text, and which of its orders.
        tokens: int64 [L], whole blocks; num_prompt: its first tokens that were never masked.
        step: int64 [L], at which of its block's forwards a position was opened, from 0; -1 = prompt.
        score: path bound per opened token, nats.
        num_steps: forwards of the slowest block.
    """

    sample: int
    number: int
    tokens: NDArray[np.int64]
    num_prompt: int
    step: NDArray[np.int64]
    score: float
    num_steps: int


@torch.inference_mode()
def draw_orders(model: Transformer, text: Sample, sample: int, config: PoolConfig, seed: int) -> list[Order]:
    """`config.num_orders` orders of one text, keyed by (seed, sample, order, step)."""
    size, count = model.config.block_size, config.num_orders
    start = text.num_prompt // size * size
    clean = torch.from_numpy(text.tokens)
    own = torch.arange(start, len(clean))
    positions = torch.cat((torch.arange(len(clean)), own)).expand(count, -1)
    copies = torch.cat((torch.zeros(len(clean), dtype=torch.int64), torch.ones_like(own))).expand(count, -1)
    attention = masked_attention(visibility(positions, copies, size))
    closed = (own >= text.num_prompt).expand(count, -1).clone()
    step = torch.full((count, len(own)), -1)
    total = torch.zeros(count)
    rounds = 0
    while bool(closed.any()):
        state = torch.where(closed, model.config.mask_token_id, clean[start:])
        tokens = torch.cat((clean.expand(count, -1), state), dim=1)
        rows = closed.nonzero()
        logits = _logits(model, tokens, positions, copies, attention, rows, len(clean))
        logprobs = logits.float().log_softmax(-1)
        confidence = torch.full(closed.shape, -torch.inf)
        confidence[closed] = logprobs.max(-1).values
        written = torch.zeros(closed.shape)
        written[closed] = logprobs.gather(1, clean[start:].expand(count, -1)[closed][:, None]).squeeze(1)
        opened = _choose(confidence, closed, size, config, ("order", seed, sample, rounds))
        total += torch.where(opened, written, 0.0).sum(1)
        step[opened] = rounds
        closed &= ~opened
        rounds += 1
    num_opened = len(clean) - text.num_prompt
    prompt = np.full(start, -1, np.int64)
    return [
        Order(sample, number, text.tokens, text.num_prompt, np.concatenate((prompt, step[number].numpy())),
              float(total[number]) / num_opened, int(step[number].max()) + 1)
        for number in range(count)
    ]  # fmt: skip


@torch.inference_mode()
def path_bound(
    model: Transformer, tokens: NDArray[np.int64], num_prompt: int, step: NDArray[np.int64]
) -> float:
    """The score of a given order, as `draw_orders` scores its own; arguments as in `Order`."""
    size = model.config.block_size
    start = num_prompt // size * size
    clean, opens = torch.from_numpy(tokens), torch.from_numpy(step[start:])
    own = torch.arange(start, len(clean))
    positions = torch.cat((torch.arange(len(clean)), own))[None]
    copies = torch.cat((torch.zeros(len(clean), dtype=torch.int64), torch.ones_like(own)))[None]
    attention = masked_attention(visibility(positions, copies, size))
    total = 0.0
    for round_ in range(int(opens.max()) + 1):
        state = torch.where(opens >= round_, model.config.mask_token_id, clean[start:])
        rows = (opens == round_)[None].nonzero()
        logits = _logits(
            model, torch.cat((clean, state))[None], positions, copies, attention, rows, len(clean)
        )
        logprobs = logits.float().log_softmax(-1)
        total += float(logprobs.gather(1, clean[start:][opens == round_][:, None]).sum())
    return total / (len(clean) - num_prompt)


def best_orders(orders: Sequence[Order], keep_share: float) -> list[Order]:
    """The share of the highest path bound, at least one; among equals the one with fewer steps, then the earlier."""
    ranked = sorted(orders, key=lambda order: (-round(order.score, 6), order.num_steps, order.number))
    return ranked[: max(1, round(len(ranked) * keep_share))]


def fill_pool(folder: Path, candidates: Callable[[int], Sequence[Order]], config: PoolConfig) -> None:
    """Draw and keep orders of all samples, a file for every few of them; files that are there are left alone.

    Args:
        candidates: the orders of a sample, of which the best are kept; a function of its number alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = range(0, config.num_samples, SAMPLES_PER_PART)
    for part, first in enumerate(parts):
        path = folder / f"part-{part:05d}.parquet"
        if path.is_file():
            continue
        kept: list[Order] = []
        for sample in range(first, min(first + SAMPLES_PER_PART, config.num_samples)):
            kept += best_orders(candidates(sample), config.keep_share)
        with atomic_file(path) as temporary:
            pq.write_table(_table(kept), temporary)
        score = sum(order.score for order in kept) / len(kept)
        steps = sum(order.num_steps for order in kept) / len(kept)
        print(
            f"pool {part + 1:>4}/{len(parts)}  {len(kept)} kept  bound {score:.4f} nats a token  {steps:.1f} steps",
            flush=True,
        )


def read_pool(folder: Path) -> list[Order]:
    """Every kept order, by sample and rank."""
    orders = []
    for path in sorted(folder.glob("part-*.parquet")):
        for row in pq.read_table(path, schema=SCHEMA).to_pylist():
            orders.append(
                Order(row["sample"], row["order"], np.array(row["tokens"], np.int64), row["num_prompt"],
                      np.array(row["step"], np.int64), row["score"], row["num_steps"])
            )  # fmt: skip
    return orders


def _logits(
    model: Transformer, tokens: torch.Tensor, positions: torch.Tensor, copies: torch.Tensor, attention: object,
    closed: torch.Tensor, num_clean: int,
) -> torch.Tensor:  # fmt: skip
    """Of the closed rows [m, 2] (order, row of the state), [m, V]; of the row before where logits are shifted."""
    target = closed[:, 0] * tokens.shape[1] + num_clean + closed[:, 1]
    if model.config.logit_shift:
        target = rows_before(positions, copies, target, model.config.block_size)
    hidden = model(tokens, positions, attention)  # type: ignore[arg-type]
    return model.logits(hidden.flatten(0, 1)[target])


def _choose(
    confidence: torch.Tensor, closed: torch.Tensor, size: int, config: PoolConfig, key: tuple[int | str, ...]
) -> torch.Tensor:
    """Which closed positions open, bool [N, S]: above the threshold, and in each block the best by noisy confidence."""
    draws = generator(*key)
    noise = torch.from_numpy(draws.gumbel(size=closed.shape)).float()
    noisy = torch.where(closed, confidence + config.temperature * noise, -torch.inf)
    ranked = noisy.view(len(noisy), -1, size)
    best = torch.zeros_like(ranked, dtype=torch.bool)
    best.scatter_(2, ranked.argmax(2, keepdim=True), True)
    sure = confidence >= float(np.log(config.threshold))
    return (best.flatten(1) | sure) & closed


def _table(orders: Sequence[Order]) -> pa.Table:
    columns = {
        "sample": [order.sample for order in orders],
        "order": [order.number for order in orders],
        "tokens": [order.tokens.astype(np.int32) for order in orders],
        "num_prompt": [order.num_prompt for order in orders],
        "step": [order.step.astype(np.int16) for order in orders],
        "score": [order.score for order in orders],
        "num_steps": [order.num_steps for order in orders],
    }
    return pa.table(columns, schema=SCHEMA)
