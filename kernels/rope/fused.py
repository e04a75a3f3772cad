"""Rotation in one pass, with the cache write of final keys and values in the same one. Derivation, bytes: README.md.

Shape legend: R rows, H heads, D head dimension, D' rotated pairs. A program holds several (row, head) vectors, because one
alone would leave most of its threads idle.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fewstep.kernels.launch import Build

# Numbers a program rotates: 16 a thread at 4 warps.
_TILE = 2048


@triton.jit
def rope_kernel(
    x, cos, sin, out, v, destination, key_pages, value_pages, num_vectors, turn,
    HEADS: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr, VECTORS: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """out = x [R, H, D] turned by turn · angle (1 or -1); if WRITE, x's rows with a destination go to pages, and v's."""
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    real = vector < num_vectors
    row = vector // HEADS
    pair = tl.arange(0, HALF)
    inside = real[:, None] & (pair < PAIRS)[None, :]
    angle_at = row[:, None] * PAIRS + pair[None, :]
    c = tl.load(cos + angle_at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle_at, mask=inside, other=0.0).to(tl.float32) * turn
    at = vector[:, None] * HEAD + pair[None, :]
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + PAIRS, mask=inside, other=0.0).to(tl.float32)
    low = (first * c - second * s).to(out.dtype.element_ty)
    high = (second * c + first * s).to(out.dtype.element_ty)
    tl.store(out + at, low, mask=inside)
    tl.store(out + at + PAIRS, high, mask=inside)
    if REST:
        behind = 2 * PAIRS + tl.arange(0, REST)
        passing = real[:, None] & (behind < HEAD)[None, :]
        rest = tl.load(x + vector[:, None] * HEAD + behind[None, :], mask=passing, other=0.0)
        tl.store(out + vector[:, None] * HEAD + behind[None, :], rest, mask=passing)
    if WRITE:
        position = tl.load(destination + row, mask=real, other=-1)
        goes = position >= 0
        page_at = ((position * HEADS + vector % HEADS) * HEAD)[:, None]
        kept = inside & goes[:, None]
        tl.store(key_pages + page_at + pair[None, :], low, mask=kept)
        tl.store(key_pages + page_at + PAIRS + pair[None, :], high, mask=kept)
        if REST:
            tl.store(key_pages + page_at + behind[None, :], rest, mask=passing & goes[:, None])
        width = tl.arange(0, WIDTH)
        whole = goes[:, None] & (width < HEAD)[None, :]
        value = tl.load(v + vector[:, None] * HEAD + width[None, :], mask=whole, other=0.0)
        tl.store(value_pages + page_at + width[None, :], value, mask=whole)


def _tile(head_dim: int, pairs: int) -> dict[str, int]:
    rest, width = head_dim - 2 * pairs, triton.next_power_of_2(head_dim)
    return {
        "HEAD": head_dim,
        "PAIRS": pairs,
        "VECTORS": max(1, _TILE // width),
        "HALF": triton.next_power_of_2(pairs),
        "REST": triton.next_power_of_2(rest) if rest else 0,
        "WIDTH": width,
    }


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turn: float) -> torch.Tensor:
    """Every vector [D] of contiguous x [..., H, D] turned by the angle of its row; cos, sin contiguous [rows, D']."""
    out = torch.empty_like(x)
    num_vectors = x.numel() // x.shape[-1]
    tile = _tile(x.shape[-1], cos.shape[-1])
    if num_vectors:
        grid = (triton.cdiv(num_vectors, tile["VECTORS"]),)
        # Without WRITE the pages are never touched; x stands in for them.
        rope_kernel[grid](
            x, cos, sin, out, x, x, x, x, num_vectors, turn, HEADS=x.shape[-2], WRITE=False, **tile
        )
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-2], 1, cos.shape[-1])
        cos, sin = (angle.expand(shape).contiguous() for angle in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return _turn(x.contiguous(), cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0].contiguous(), cos, sin, -1.0), None, None


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `fewstep.kernels.rope.apply_rope`."""
    return _Rope.apply(x, cos, sin)  # type: ignore[no-any-return]


def rope_and_write(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destination: torch.Tensor | None,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
) -> torch.Tensor:
    """See `fewstep.kernels.rope.rope_and_write`."""
    k, v, cos, sin = k.contiguous(), v.contiguous(), cos.contiguous(), sin.contiguous()
    if destination is None:
        return _turn(k, cos, sin, 1.0)
    out = torch.empty_like(k)
    tile = _tile(k.shape[-1], cos.shape[-1])
    num_vectors = k.shape[0] * k.shape[1]
    if num_vectors:
        rope_kernel[(triton.cdiv(num_vectors, tile["VECTORS"]),)](
            k,
            cos,
            sin,
            out,
            v,
            destination.contiguous(),
            key_pages,
            value_pages,
            num_vectors,
            1.0,
            HEADS=k.shape[1],
            WRITE=True,
            **tile,
        )
    return out


def _builds() -> list[Build]:
    builds = []
    for dtype, heads, head_dim, pairs, write in (
        ("bf16", 32, 128, 64, False),
        ("bf16", 8, 128, 64, True),
        ("bf16", 4, 128, 32, True),
        ("fp32", 4, 32, 16, True),
    ):
        values = dict.fromkeys(("x", "out", "v", "key_pages", "value_pages"), f"*{dtype}:16")
        whole = {"destination": "*i64:16", "num_vectors": "i32"}
        builds.append(
            Build(
                f"{dtype} D={head_dim} D'={pairs}{' write' * write}",
                rope_kernel,
                values | dict.fromkeys(("cos", "sin"), "*fp32:16") | whole | {"turn": "fp32"},
                _tile(head_dim, pairs) | {"HEADS": heads, "WRITE": write},
            )
        )
    return builds


BUILDS = _builds()
