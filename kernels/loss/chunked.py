"""Log-probability of targets without [m, V] in memory, on any device: vocabulary chunks forward, again backward.

Derivation in README.md. Shape legend: m rows, V vocabulary, d hidden, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# exp of anything lower is 0 in float32, and 0 · finite is 0 where 0 · -inf is NaN.
_NOTHING = -200.0


def _chunk(
    hidden: torch.Tensor, weight: torch.Tensor, first: int, size: int, mask_token_id: int | None
) -> torch.Tensor:
    """Logits [m, C] of tokens first .. first + size, float32 or wider."""
    scores = F.linear(hidden, weight[first : first + size])
    if mask_token_id is not None and first <= mask_token_id < first + scores.shape[1]:
        scores[:, mask_token_id - first] = -torch.inf
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def add_chunk_gradients(
    grad_logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    first: int,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Backward of one chunk's projection, grad_logits [m, C]: its rows of grad_weight, its share of grad_hidden.

    A chunk owns its rows of the weight, so those are written once; only [m, d] is summed over chunks, in float32.
    """
    size = grad_logits.shape[1]
    if grad_weight is not None:
        torch.mm(grad_logits.t(), hidden, out=grad_weight[first : first + size])
    if grad_hidden is not None:
        if grad_hidden.dtype == weight.dtype:
            grad_hidden.addmm_(grad_logits, weight[first : first + size])
        else:
            grad_hidden.add_(grad_logits @ weight[first : first + size])


class LinearLogprob(torch.autograd.Function):
    """(hidden [m, d], weight [V, d], targets [m], mask token, chunk C) to (logprob [m], entropy [m])."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        mask_token_id: int | None,
        size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        top = torch.full((len(hidden), 1), -torch.inf, dtype=kind, device=hidden.device)
        total, moment, chosen = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        for first in range(0, len(weight), size):
            scores = _chunk(hidden, weight, first, size, mask_token_id)
            own = (targets - first)[:, None]
            inside = (own >= 0) & (own < scores.shape[1])
            chosen = torch.where(inside, scores.gather(1, own.clamp(0, scores.shape[1] - 1)), chosen)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            # A maximum of -inf means no token yet; 0 in its place keeps -inf - -inf out.
            shift = higher.masked_fill(higher == -torch.inf, 0.0)
            drop = (top - shift).clamp_(min=_NOTHING)
            rescale = (top - shift).exp_()
            shifted = scores.sub_(shift).clamp_(min=_NOTHING)
            mass = shifted.exp()
            moment = rescale * (moment + drop * total) + shifted.mul_(mass).sum(-1, keepdim=True)
            total = total * rescale + mass.sum(-1, keepdim=True)
            top = higher
        normaliser = top + total.log()
        entropy = total.log() - moment / total
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.mask_token_id, ctx.size = mask_token_id, size
        ctx.set_materialize_grads(False)
        return (chosen - normaliser)[:, 0], entropy[:, 0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for first in range(0, len(weight), ctx.size):
            scores = _chunk(hidden, weight, first, ctx.size, ctx.mask_token_id)
            grad = _grad_logits(scores, normaliser, entropy, grad_logprob, grad_entropy)
            if grad_logprob is not None:
                row = ((targets >= first) & (targets < first + scores.shape[1])).nonzero()[:, 0]
                grad[row, targets[row] - first] += grad_logprob[row]
            add_chunk_gradients(grad.to(hidden.dtype), hidden, weight, first, grad_hidden, grad_weight)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            None,
            None,
            None,
        )


def _grad_logits(
    scores: torch.Tensor,
    normaliser: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """-p · (g + h · (log p + H)), without the target's own g; `scores` [m, C] is overwritten."""
    log_p = scores.sub_(normaliser).clamp_(min=_NOTHING)
    p = log_p.exp()
    if grad_entropy is None:
        factor = torch.zeros_like(normaliser) if grad_logprob is None else grad_logprob[:, None]
        return p.mul_(-factor)
    inner = log_p.add_(entropy).mul_(grad_entropy[:, None])
    if grad_logprob is not None:
        inner.add_(grad_logprob[:, None])
    return inner.mul_(p).neg_()


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    mask_token_id: int | None,
    max_elements: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fewstep.kernels.loss.linear_logprob`; holds about four tensors of `max_elements` at a time."""
    size = max(1, min(len(weight), max_elements // max(1, len(hidden))))
    return LinearLogprob.apply(hidden, weight, targets, mask_token_id, size)  # type: ignore[no-any-return,no-untyped-call]
