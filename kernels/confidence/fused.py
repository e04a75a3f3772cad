"""The commit rule, one program a sequence. Rules, derivation and bytes: README.md.

Shape legend: N sequences, B block size, E end-of-sequence ids. The sort of the reference is a count here: position j comes
before i if its key is greater, or equal and further left. B² comparisons of numbers that a program holds anyway are less
than a sort's exchanges for B <= 256.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fewstep.kernels.confidence.records import (
    NEVER,
    POLICY_KINDS,
    Candidates,
    CanvasBlock,
    Committed,
    PolicyTensors,
)
from fewstep.kernels.confidence.reference import ENTROPY_UNITS
from fewstep.kernels.launch import Build

_THRESHOLD = tl.constexpr(POLICY_KINDS["threshold"])
_ENTROPY_BOUND = tl.constexpr(POLICY_KINDS["entropy_bound"])
_FACTOR = tl.constexpr(POLICY_KINDS["factor"])
_NEVER = tl.constexpr(NEVER)
_UNITS = tl.constexpr(ENTROPY_UNITS)
# Positions compared with the whole block at a time.
_CHUNK = 16


@triton.jit
def _keys(confidence, entropy, masked, at, inside, by_entropy, ENTROPY: tl.constexpr):
    """What the positions `at` are sorted by, greatest first, and their entropy in units (`reference.entropy_units`)."""
    key = tl.load(confidence + at, mask=inside, other=0.0)
    units = tl.zeros(key.shape, tl.int64)
    if ENTROPY:
        nats = tl.load(entropy + at, mask=inside, other=0.0)
        key = tl.where(by_entropy, 0.0 - nats, key)
        nats = tl.where(nats <= 1024.0, nats, 1024.0)
        units = (tl.where(nats > 0.0, nats, 0.0).to(tl.float64) * _UNITS).to(tl.int64)
    # Not a number: no comparison holds.
    open_to = (tl.load(masked + at, mask=inside, other=0) != 0) & ((key <= 0.0) | (key > 0.0))
    return tl.where(open_to, key, float("-inf")), tl.where(inside, units, 0)


@triton.jit
def commit_kernel(
    tokens, masked, generated, ends, candidate, confidence, entropy, kind, number, at_least,
    edit_threshold, allow_edit, out, opened, edited, filled, first_mask, first_end, num_ends, eos_token_id,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Grid (N,): every output of `Committed` for one sequence; flags are bytes."""
    sequence = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, COLUMNS)
    inside = index < WIDTH
    at = sequence * WIDTH + index
    rule = tl.load(kind + sequence)
    bound = tl.load(number + sequence)
    by_entropy = rule == _ENTROPY_BOUND
    is_masked = tl.load(masked + at, mask=inside, other=0) != 0
    mine = tl.load(generated + at, mask=inside, other=0) != 0
    current = tl.load(tokens + at, mask=inside, other=0)
    new = tl.load(candidate + at, mask=inside, other=0)
    sure = tl.load(confidence + at, mask=inside, other=0.0)
    key, _ = _keys(confidence, entropy, masked, at, inside, by_entropy, ENTROPY)

    rank = tl.zeros([COLUMNS], tl.int32)
    before = tl.zeros([COLUMNS], tl.int64)
    for chunk in range(0, WIDTH, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        there = other < WIDTH
        other_key, units = _keys(
            confidence, entropy, masked, sequence * WIDTH + other, there, by_entropy, ENTROPY
        )
        left = other[None, :] < index[:, None]
        ahead = (other_key[None, :] > key[:, None]) | ((other_key[None, :] == key[:, None]) & left)
        ahead = ahead & there[None, :]
        rank += tl.sum(ahead.to(tl.int32), 1)
        if ENTROPY:
            before += tl.sum(tl.where(ahead, units[None, :], 0), 1)

    opens = rank < tl.load(at_least + sequence)
    opens = opens | ((rule == _THRESHOLD) & (sure >= bound))
    opens = opens | ((rule == _FACTOR) & ((rank + 2).to(tl.float32) * (1.0 - sure) < bound))
    if ENTROPY:
        opens = opens | (by_entropy & (before.to(tl.float64) <= bound.to(tl.float64) * _UNITS))
    opens = opens & is_masked
    edits = mine & (is_masked == 0) & (new != current) & (sure > tl.load(edit_threshold + sequence))
    edits = edits & (tl.load(allow_edit + sequence) != 0)
    current = tl.where(opens | edits, new, current)

    is_end = index < 0
    for which in range(num_ends):
        is_end = is_end | (current == tl.load(ends + sequence * num_ends + which))
    end = tl.min(tl.where(is_end & mine, index, _NEVER), 0)
    left_over = is_masked & (opens == 0)
    fills = left_over & (index > end)
    tl.store(out + at, tl.where(fills, eos_token_id, current), mask=inside)
    tl.store(opened + at, opens.to(tl.uint8), mask=inside)
    tl.store(edited + at, edits.to(tl.uint8), mask=inside)
    tl.store(filled + at, fills.to(tl.uint8), mask=inside)
    still = left_over & (fills == 0)
    tl.store(first_mask + sequence, tl.min(tl.where(still, index, WIDTH), 0).to(tl.int64))
    tl.store(first_end + sequence, end.to(tl.int64))


def commit(canvas: CanvasBlock, candidates: Candidates, policy: PolicyTensors) -> Committed:
    """See `fewstep.kernels.confidence.commit`."""
    tokens, confidence = canvas.tokens.contiguous(), candidates.confidence.contiguous()
    num_sequences, width = tokens.shape
    masked, generated, allow_edit = (
        flags.contiguous().view(torch.uint8) for flags in (canvas.masked, canvas.generated, policy.allow_edit)
    )
    ends, entropy = canvas.ends.contiguous(), candidates.entropy
    out = torch.empty_like(tokens)
    flags = torch.empty((3, num_sequences, width), dtype=torch.bool, device=tokens.device)
    firsts = torch.empty((2, num_sequences), dtype=torch.int64, device=tokens.device)
    opened, edited, filled = flags.view(torch.uint8)
    if num_sequences:
        commit_kernel[(num_sequences,)](
            tokens, masked, generated, ends, candidates.token.contiguous(), confidence,
            confidence if entropy is None else entropy.contiguous(), policy.kind.contiguous(),
            policy.number.contiguous(), policy.at_least.contiguous(), policy.edit_threshold.contiguous(),
            allow_edit, out, opened, edited, filled, firsts[0], firsts[1], ends.shape[1], canvas.eos_token_id,
            WIDTH=width, COLUMNS=triton.next_power_of_2(width), CHUNK=_CHUNK, ENTROPY=entropy is not None,
            num_warps=1 if width <= 64 else 4,
        )  # fmt: skip
    return Committed(out, *flags, *firsts)


def _builds() -> list[Build]:
    bytes_ = dict.fromkeys(("masked", "generated", "allow_edit", "opened", "edited", "filled"), "*u8")
    whole = dict.fromkeys(
        ("tokens", "ends", "candidate", "at_least", "out", "first_mask", "first_end"), "*i64"
    )
    real = dict.fromkeys(("confidence", "entropy", "number", "edit_threshold"), "*fp32")
    scalars = {"kind": "*i8", "num_ends": "i32", "eos_token_id": "i32"}
    return [
        Build(
            f"commit B={width}{' entropy' * entropy}",
            commit_kernel,
            bytes_ | whole | real | scalars,
            {"WIDTH": width, "COLUMNS": width, "CHUNK": _CHUNK, "ENTROPY": entropy},
            1 if width <= 64 else 4,
        )
        for width, entropy in ((32, False), (32, True), (256, True))
    ]


BUILDS = _builds()
