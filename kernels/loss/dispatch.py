"""One entry to the log-probabilities of a linear head, whatever runs it."""

from __future__ import annotations

from typing import Literal

import torch

from fewstep.kernels.launch import implementation_for
from fewstep.kernels.loss import chunked, reference

# Logits held at a time: 16 MiB in float32 on the CPU, 128 MiB in bfloat16 on a GPU.
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 22, 1 << 26


def holds_logits(num_rows: int, vocabulary: int) -> bool:
    """Whether the CPU's default keeps all logits: below 16 MiB of float32 the reference is as fast and simpler."""
    return num_rows * vocabulary < CPU_CHUNK_ELEMENTS


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    mask_token_id: int | None,
    max_elements: int | None = None,
    impl: Literal["reference", "chunked", "fused"] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden · weightᵀ)[target] and the softmax's entropy; both differentiable in hidden and weight.

    Args:
        hidden: [m, d]; weight: [V, d], the same type; targets: int64 [m].
        mask_token_id: the column that gets -inf, None = no column.
        max_elements: logits held at a time (chunked, and fused in its backward); None = the device's default.
        impl: None = fused for CUDA tensors; on the CPU reference while it holds fewer than 2**22 logits, else chunked.
    Returns:
        logprob [m], entropy in nats [m]; float32, or float64 for float64 input. -inf for a target with no probability.
    Errors:
        ResourceError: fused was asked for where it cannot run.
    """
    chosen = implementation_for("linear_logprob", impl, hidden)
    if max_elements is None:
        max_elements = GPU_CHUNK_ELEMENTS if hidden.is_cuda else CPU_CHUNK_ELEMENTS
    if chosen == "fused":
        from fewstep.kernels.loss import fused

        return fused.linear_logprob(hidden, weight, targets, mask_token_id, max_elements)
    if chosen == "chunked" or (impl is None and not holds_logits(len(hidden), len(weight))):
        return chunked.linear_logprob(hidden, weight, targets, mask_token_id, max_elements)
    return reference.linear_logprob(hidden, weight, targets, mask_token_id)
