"""Log-probability of targets with the projection fused in, forward and backward. Derivation, bytes, FLOP: README.md.

Shape legend: m rows, V vocabulary, d hidden, S splits of the vocabulary, C tokens of a backward chunk.

Forward: a program projects a tile of rows on a run of vocabulary tiles and keeps a running softmax; S partial results a
row are joined by torch. Backward: a program projects a tile again and writes its gradient straight away, [m, C] in the
weight's type; the two products with it are plain matrix products and torch's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from fewstep.kernels.head.fused import (
    GROUP,
    finite_shift,
    mass_times_distance,
    projection_tile,
    tile_logits,
    tile_of_program,
)
from fewstep.kernels.launch import Build
from fewstep.kernels.loss.chunked import add_chunk_gradients

# Programs the forward is cut into at least: a dozen for each of 132 to 148 multiprocessors, so that the last wave is
# short. More splits only write more partial results.
_PROGRAMS = 2048


@triton.jit
def logprob_forward_kernel(
    hidden, weight, targets, best, total, moment, chosen, num_rows, vocabulary, width, mask_token,
    num_row_tiles, num_tiles, num_splits, tiles_of_split,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Of each row and split: best logit, Σ e^x and Σ e^x·x over x = logit - best, all [m, S]; chosen [m]: the target's."""
    row_tile, split = tile_of_program(num_row_tiles, num_splits, GROUP)
    index = row_tile * ROWS + tl.arange(0, ROWS)
    real = index < num_rows
    safe = tl.minimum(index, num_rows - 1).to(tl.int64)
    target = tl.load(targets + safe)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    mass_sum = tl.zeros([ROWS], dtype=tl.float32)
    moment_sum = tl.zeros([ROWS], dtype=tl.float32)
    hit = tl.zeros([ROWS], dtype=tl.float32)
    first_tile = split * tiles_of_split
    last_tile = tl.minimum(first_tile + tiles_of_split, num_tiles)
    for tile in range(first_tile, last_tile):
        tokens = tile * TOKENS + tl.arange(0, TOKENS)
        logits = tile_logits(
            hidden, safe * width, weight, tokens, width, vocabulary, mask_token, TOKENS, ROWS, DEPTH, EVEN, 1
        )
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shift = finite_shift(higher)
        rescale = tl.exp(top - shift)
        distance = logits - shift[:, None]
        mass = tl.exp(distance)
        own = tl.sum(mass_times_distance(mass, distance), axis=1)
        moment_sum = rescale * moment_sum + mass_times_distance(mass_sum * rescale, top - shift) + own
        mass_sum = mass_sum * rescale + tl.sum(mass, axis=1)
        hit += tl.sum(tl.where(tokens[None, :] == target[:, None], logits, 0.0), axis=1)
        top = higher
    where = index.to(tl.int64) * num_splits + split
    tl.store(best + where, top, mask=real)
    tl.store(total + where, mass_sum, mask=real)
    tl.store(moment + where, moment_sum, mask=real)
    mine = (target >= first_tile * TOKENS) & (target < last_tile * TOKENS)
    tl.store(chosen + index, hit, mask=real & mine)


@triton.jit
def logprob_gradient_kernel(
    hidden, weight, targets, normaliser, entropy, grad_logprob, grad_entropy, grad_logits, num_rows,
    first_token, last_token, vocabulary, width, mask_token, num_row_tiles, num_tiles,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """grad_logits [m, C] of tokens first_token .. last_token: g·(δ - p) - h·p·(log p + H)."""
    row_tile, tile = tile_of_program(num_row_tiles, num_tiles, GROUP)
    index = row_tile * ROWS + tl.arange(0, ROWS)
    real = index < num_rows
    safe = tl.minimum(index, num_rows - 1).to(tl.int64)
    tokens = first_token + tile * TOKENS + tl.arange(0, TOKENS)
    logits = tile_logits(
        hidden, safe * width, weight, tokens, width, vocabulary, mask_token, TOKENS, ROWS, DEPTH, EVEN, 1
    )
    log_p = logits - tl.load(normaliser + safe)[:, None]
    p = tl.exp(log_p)
    g = tl.load(grad_logprob + safe)[:, None]
    grad = tl.where(tokens[None, :] == tl.load(targets + safe)[:, None], g, 0.0) - g * p
    if ENTROPY:
        spread = mass_times_distance(p, log_p) + p * tl.load(entropy + safe)[:, None]
        grad -= tl.load(grad_entropy + safe)[:, None] * spread
    place = index.to(tl.int64)[:, None] * (last_token - first_token) + (tokens - first_token)[None, :]
    inside = real[:, None] & (tokens < last_token)[None, :]
    tl.store(grad_logits + place, grad.to(grad_logits.dtype.element_ty), mask=inside)


def _tile(num_rows: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The head's tile with rows on the left whatever their number: training has thousands."""
    tile = projection_tile(num_rows, width, dtype)
    del tile["AXIS"]
    return tile


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        mask_token: int,
        max_elements: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = hidden.contiguous(), weight.contiguous()
        num_rows, (vocabulary, width) = len(hidden), weight.shape
        tile = _tile(num_rows, width, weight.dtype)
        num_row_tiles, num_tiles = (
            triton.cdiv(num_rows, tile["ROWS"]),
            triton.cdiv(vocabulary, tile["TOKENS"]),
        )
        tiles_of_split = max(1, num_row_tiles * num_tiles // _PROGRAMS)
        num_splits = triton.cdiv(num_tiles, tiles_of_split)
        best, total, moment = torch.empty(
            3, num_rows, num_splits, dtype=torch.float32, device=hidden.device
        ).unbind()
        chosen = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        if num_rows:
            logprob_forward_kernel[(num_row_tiles * num_splits,)](
                hidden,
                weight,
                targets,
                best,
                total,
                moment,
                chosen,
                num_rows,
                vocabulary,
                width,
                mask_token,
                num_row_tiles,
                num_tiles,
                num_splits,
                tiles_of_split,
                GROUP=GROUP,
                **tile,
            )
        top = best.amax(-1, keepdim=True)
        distance = (best - top).clamp_(min=torch.finfo(torch.float32).min)
        share = total * distance.exp()
        mass = share.sum(-1)
        normaliser = top[:, 0] + mass.log()
        entropy = mass.log() - (moment * distance.exp() + share * distance).sum(-1) / mass
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.mask_token, ctx.max_elements = mask_token, max_elements
        ctx.set_materialize_grads(False)
        return chosen - normaliser, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        num_rows, (vocabulary, width) = len(hidden), weight.shape
        tile = _tile(num_rows, width, weight.dtype)
        num_row_tiles = triton.cdiv(num_rows, tile["ROWS"])
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(normaliser)
        grad_logprob = grad_logprob.contiguous()
        if grad_entropy is None:
            entropy = None
        else:
            grad_entropy = grad_entropy.contiguous()
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        chunk = max(1, ctx.max_elements // max(1, num_rows))
        chunk = min(triton.cdiv(chunk, tile["TOKENS"]) * tile["TOKENS"], vocabulary)
        buffer = torch.empty(num_rows * chunk, dtype=weight.dtype, device=hidden.device)
        for first in range(0, vocabulary, chunk):
            size = min(chunk, vocabulary - first)
            num_tiles = triton.cdiv(size, tile["TOKENS"])
            if num_rows:
                logprob_gradient_kernel[(num_row_tiles * num_tiles,)](
                    hidden,
                    weight,
                    targets,
                    normaliser,
                    entropy,
                    grad_logprob,
                    grad_entropy,
                    buffer,
                    num_rows,
                    first,
                    first + size,
                    vocabulary,
                    width,
                    ctx.mask_token,
                    num_row_tiles,
                    num_tiles,
                    GROUP=GROUP,
                    ENTROPY=grad_entropy is not None,
                    **tile,
                )
            grad_logits = buffer[: num_rows * size].view(num_rows, size)
            add_chunk_gradients(grad_logits, hidden, weight, first, grad_hidden, grad_weight)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    mask_token_id: int | None,
    max_elements: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fewstep.kernels.loss.linear_logprob`; the backward holds max_elements gradients of logits."""
    mask_token = -1 if mask_token_id is None else mask_token_id
    return _LinearLogprob.apply(hidden, weight, targets, mask_token, max_elements)  # type: ignore[no-any-return]


def _builds() -> list[Build]:
    types = {
        "targets": "*i64:16",
        **dict.fromkeys(("best", "total", "moment", "chosen", "normaliser", "entropy"), "*fp32:16"),
        **dict.fromkeys(("grad_logprob", "grad_entropy"), "*fp32:16"),
        **dict.fromkeys(("num_rows", "vocabulary", "width", "first_token", "last_token"), "i32:16"),
        **dict.fromkeys(("mask_token", "num_row_tiles", "num_tiles", "num_splits", "tiles_of_split"), "i32"),
    }
    builds = []
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        signature = types | dict.fromkeys(("hidden", "weight", "grad_logits"), f"*{kind}:16")
        tile = _tile(4096, 4096, dtype)
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        for title, kernel, constants in (
            ("forward", logprob_forward_kernel, {}),
            ("gradient", logprob_gradient_kernel, {"ENTROPY": False, "entropy": None, "grad_entropy": None}),
            ("gradient entropy", logprob_gradient_kernel, {"ENTROPY": True}),
        ):
            constexprs = tile | {"GROUP": GROUP} | constants
            arguments = {name: signature[name] for name in kernel.arg_names if name not in constexprs}
            builds.append(Build(f"{title} {kind}", kernel, arguments, constexprs, warps, stages))
    return builds


BUILDS = _builds()
