"""Log-probability and entropy of chosen rows, the quantity every objective is made of."""

from __future__ import annotations

import torch


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits)[target] and the softmax's entropy.

    Args:
        logits: [m, V], the mask token's column may be -inf; targets: int64 [m].
    Returns:
        logprob float32 [m], entropy in nats float32 [m].
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
    # A column of -inf has probability 0 and adds 0 to the entropy; 0 · -inf would be NaN, gradient included.
    finite = logprobs.masked_fill(torch.isneginf(logprobs), 0.0)
    return chosen, -(finite.exp() * finite * torch.isfinite(logprobs)).sum(-1)
