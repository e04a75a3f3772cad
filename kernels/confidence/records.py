"""What `commit` reads and what it returns: the live blocks of a batch as tensors, nothing per request in Python.

Shape legend: N sequences, B block size, E end-of-sequence ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# The codes of `PolicyTensors.kind`, by the names of `DecodePolicy.kind`.
POLICY_KINDS = {"threshold": 0, "static": 1, "entropy_bound": 2, "factor": 3}

# `Committed.first_end` where no end of sequence stands in the block: behind every index of every block.
NEVER = 1 << 30


class CanvasBlock(NamedTuple):
    """The live block of every sequence.

    Attributes:
        tokens: int64 [N, B].
        masked: bool [N, B], still to be written.
        generated: bool [N, B], written by the model: behind the prompt and before a suffix. Holds `masked`.
        ends: int64 [N, E], ids that end a sequence, padded with -1.
        eos_token_id: what masked positions behind an end are filled with.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    generated: torch.Tensor
    ends: torch.Tensor
    eos_token_id: int


class Candidates(NamedTuple):
    """What the model would write at each position of the block; any finite number where it was not asked.

    Attributes:
        token: int64 [N, B].
        confidence: float32 [N, B], read where `masked`, and where `generated` by sequences that edit.
        entropy: float32 [N, B] in nats, read where `masked`; None when no policy is an entropy bound.
    """

    token: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor | None = None


class PolicyTensors(NamedTuple):
    """The decode policy of every sequence.

    Attributes:
        kind: int8 [N], a code of POLICY_KINDS.
        number: float32 [N]: threshold's tau, entropy_bound's bound in nats, factor's factor; static reads none.
        at_least: int64 [N], at least 1: this many masked positions open in any case, the best of the kind's order.
        edit_threshold: float32 [N], a written token is replaced above it; inf = editing is off.
        allow_edit: bool [N], whether a sequence may edit in this step.
    """

    kind: torch.Tensor
    number: torch.Tensor
    at_least: torch.Tensor
    edit_threshold: torch.Tensor
    allow_edit: torch.Tensor


class Committed(NamedTuple):
    """The block after the step.

    Attributes:
        tokens: int64 [N, B].
        opened, edited, filled: bool [N, B], pairwise disjoint: masks the policy wrote, tokens it replaced, masks
            closed because they lie behind an end of sequence.
        first_mask: int64 [N], first position that is still masked; B = the block is full.
        first_end: int64 [N], first generated position that holds an end of sequence; NEVER = none does.
    """

    tokens: torch.Tensor
    opened: torch.Tensor
    edited: torch.Tensor
    filled: torch.Tensor
    first_mask: torch.Tensor
    first_end: torch.Tensor
