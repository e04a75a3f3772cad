"""The two forward processes of the curriculum: masking and editing (Seed Diffusion, 2508.02193, eq. 1-4).

A sample is prompt + answer (+ end-of-sequence filling up the last block). Both processes touch answer positions
only and return *states*: whole blocks of tokens with targets and weights, ready for `SampleRows.add_state`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels.rows import NO_TARGET, SampleRows

Tokens = NDArray[np.int64]

MAX_WEIGHT = 4.0
EDIT_RATE_CAP = 0.1
EDIT_KINDS = ("substitute", "insert", "delete")
EDIT_PROBABILITIES = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Sample:
    """tokens int64 [L], L a multiple of the block size; positions >= num_prompt are the answer."""

    tokens: Tokens
    num_prompt: int

    @classmethod
    def padded(cls, tokens: Tokens, num_prompt: int, block_size: int, eos: int) -> Sample:
        """Fill the last block with end-of-sequence, which is supervised like any answer token."""
        fill = -len(tokens) % block_size
        return cls(np.concatenate((tokens, np.full(fill, eos, np.int64))), num_prompt)


def mask_states(
    sample: Sample,
    rows: SampleRows,
    *,
    block_size: int,
    mask_token: int,
    rates: tuple[float, float],
    complementary: bool,
    draws: np.random.Generator,
    weighted: bool = True,
) -> None:
    """Add a masked state, and its complement, to `rows`.

    Every block draws its own rate t ~ U(rates) (clipped schedule, BD3-LM 2503.09573), each answer position
    of it is masked with probability t, at least one per block, and weighs 1/t clipped at MAX_WEIGHT, or 1 where not
    `weighted`. With `complementary` (Fast-dLLM v2, 2509.26328) a second state masks exactly the other positions, weight 1/(1-t).
    A block of one position has nothing but its mask, so it gets no complement.
    """
    start = sample.num_prompt // block_size * block_size
    positions = np.arange(start, len(sample.tokens))
    tokens, answer = sample.tokens[start:], positions >= sample.num_prompt
    block = (positions - start) // block_size
    num_blocks = int(block[-1]) + 1
    rate = draws.uniform(*rates, num_blocks) if block_size > 1 else np.ones(num_blocks)
    masked = (draws.random(len(positions)) < rate[block]) & answer
    _force_one_per_block(masked, answer, block, draws)
    highest = MAX_WEIGHT if weighted else 1.0
    _add_masked(rows, tokens, positions, masked, rate[block], highest, mask_token)
    rest = answer & ~masked
    if complementary and block_size > 1 and rest.any():
        _add_masked(rows, tokens, positions, rest, 1 - rate[block], highest, mask_token)


def _force_one_per_block(
    masked: NDArray[np.bool_], answer: NDArray[np.bool_], block: NDArray[np.int64], draws: np.random.Generator
) -> None:
    for b in range(int(block[-1]) + 1):
        own = (block == b) & answer
        if own.any() and not masked[own].any():
            masked[draws.choice(own.nonzero()[0])] = True


def _add_masked(
    rows: SampleRows,
    tokens: Tokens,
    positions: Tokens,
    masked: NDArray[np.bool_],
    rate: NDArray[np.float64],
    highest: float,
    mask_token: int,
) -> None:
    weight = np.minimum(1 / np.maximum(rate, 1e-6), highest)
    rows.add_state(
        tokens=np.where(masked, mask_token, tokens),
        positions=positions,
        targets=np.where(masked, tokens, NO_TARGET),
        weights=np.where(masked, weight, 0.0).astype(np.float32),
        noise=rate.astype(np.float32),
    )


def edit_state(
    sample: Sample,
    rows: SampleRows,
    *,
    block_size: int,
    vocabulary: Tokens,
    draws: np.random.Generator,
    whole: bool = False,
) -> None:
    """Add an edited state to `rows`: k = floor(|answer| · α), α ~ U(0, 0.1), token edits, all positions supervised.

    Nothing is carried over: visible tokens are predicted too, so the model learns to doubt them. Insertions and
    deletions shift the rest of their block, which is cropped or refilled with its own last token (reading 1 of
    the length question: local shift-and-crop). `vocabulary` are the tokens an edit may write. `whole` = the state holds
    the prompt's blocks, too, as a bidirectional model needs it.
    """
    start = 0 if whole else sample.num_prompt // block_size * block_size
    positions = np.arange(start, len(sample.tokens))
    answer = positions >= sample.num_prompt
    edited = sample.tokens[start:].copy()
    count = int(answer.sum() * draws.uniform(0.0, EDIT_RATE_CAP))
    for at in draws.choice(answer.nonzero()[0], count, replace=False):
        end = min(len(edited), (int(at) // block_size + 1) * block_size)
        kind = EDIT_KINDS[int(draws.choice(len(EDIT_KINDS), p=EDIT_PROBABILITIES))]
        token = vocabulary[draws.integers(len(vocabulary))]
        if kind == "delete":
            edited[at : end - 1] = edited[at + 1 : end].copy()
        else:
            if kind == "insert":
                edited[at + 1 : end] = edited[at : end - 1].copy()
            edited[at] = token
    rows.add_state(
        tokens=edited,
        positions=positions,
        targets=np.where(answer, sample.tokens[start:], NO_TARGET),
        weights=answer.astype(np.float32),
        noise=np.zeros(len(edited), np.float32),
    )
