"""Log-probability and entropy of chosen rows, the quantity every objective is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits)[target] and the softmax's entropy.

    Args:
        logits: [m, V], the mask token's column may be -inf; targets: int64 [m].
    Returns:
        logprob [m], entropy in nats [m]; float32, or float64 for float64 logits.
    """
    logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
    # A column of -inf has probability 0 and adds 0 to the entropy; 0 · -inf would be NaN, gradient included.
    finite = logprobs.masked_fill(torch.isneginf(logprobs), 0.0)
    return chosen, -(finite.exp() * finite * torch.isfinite(logprobs)).sum(-1)


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mask_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fewstep.kernels.loss.linear_logprob`; holds [m, V] and its gradient."""
    logits = F.linear(hidden, weight)
    if mask_token_id is not None:
        logits[:, mask_token_id] = -torch.inf
    return target_logprobs(logits, targets)
