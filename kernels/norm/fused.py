"""RMSNorm in one pass forward and one pass backward. Derivation, bytes and FLOP: README.md.

Shape legend: M rows, d columns. A program holds whole rows, so x is read once; several short rows share a program,
because a head of 128 numbers alone would leave most of its threads idle.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fewstep.kernels.launch import Build

# Numbers a program holds at a time: 32 a thread at 4 warps.
_TILE = 4096
# The backward's weight gradient is summed by this many programs before torch adds their rows up: about four a
# multiprocessor, few enough that [_PARTIALS, d] floats are little beside [M, d].
_PARTIALS = 512


@triton.jit
def rms_norm_kernel(
    x, picked, weight, out, inverse, num_rows, num_columns, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """out = x · inverse · weight with inverse [M] = 1 / sqrt(mean(x²) + eps), ROWS rows a program.

    GATHER: row i of the output is of row picked[i] of x, and `inverse` is not written.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    where = rows[:, None] * num_columns + columns[None, :]
    if GATHER:
        source = tl.load(picked + rows, mask=rows < num_rows, other=0)
        value = tl.load(x + source[:, None] * num_columns + columns[None, :], mask=inside, other=0.0)
    else:
        value = tl.load(x + where, mask=inside, other=0.0)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / num_columns + eps)
    gain = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    result = value * scale[:, None] * gain[None, :]
    tl.store(out + where, result.to(out.dtype.element_ty), mask=inside)
    if not GATHER:
        tl.store(inverse + rows, scale, mask=rows < num_rows)


@triton.jit
def rms_norm_backward_kernel(
    grad, x, weight, inverse, grad_x, partial, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x, and each program's share of the weight's gradient: row program_id of partial [_PARTIALS, d]."""
    columns = tl.arange(0, COLUMNS)
    real = columns < num_columns
    gain = tl.load(weight + columns, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    stride = tl.num_programs(0) * ROWS
    for first in range(tl.program_id(0) * ROWS, num_rows, stride):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < num_rows)[:, None] & real[None, :]
        where = rows[:, None] * num_columns + columns[None, :]
        scale = tl.load(inverse + rows, mask=rows < num_rows, other=0.0)[:, None]
        normed = tl.load(x + where, mask=inside, other=0.0).to(tl.float32) * scale
        upstream = tl.load(grad + where, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(upstream * normed, axis=0)
        scaled = upstream * gain[None, :]
        along = tl.sum(scaled * normed, axis=1) / num_columns
        result = (scaled - normed * along[:, None]) * scale
        tl.store(grad_x + where, result.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * num_columns + columns, total, mask=real)


def _tile(num_columns: int) -> dict[str, Any]:
    """Rows and columns a program holds, and the warps for them."""
    columns = triton.next_power_of_2(num_columns)
    rows = max(1, _TILE // columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(16, max(4, rows * columns // 1024))}


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        num_columns = x.shape[-1]
        num_rows = x.numel() // num_columns
        out = torch.empty_like(x)
        inverse = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        tile = _tile(num_columns)
        if num_rows:
            grid = (triton.cdiv(num_rows, tile["ROWS"]),)
            rms_norm_kernel[grid](
                x, None, weight, out, inverse, num_rows, num_columns, eps, GATHER=False, **tile
            )
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad = grads[0].contiguous()
        num_rows, num_columns = len(inverse), x.shape[-1]
        grad_x = torch.empty_like(x)
        tile = _tile(num_columns)
        programs = min(_PARTIALS, triton.cdiv(num_rows, tile["ROWS"]))
        partial = torch.empty(programs, num_columns, dtype=torch.float32, device=x.device)
        if num_rows:
            rms_norm_backward_kernel[(programs,)](
                grad, x, weight, inverse, grad_x, partial, num_rows, num_columns, **tile
            )
        return grad_x, partial.sum(0).to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `fewstep.kernels.norm.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def rms_norm_rows(x: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[M, d]: rms_norm(x[rows]) of x [R, d] and int64 rows [M], in one pass; not differentiable."""
    x = x.contiguous()
    out = torch.empty(len(rows), x.shape[1], dtype=x.dtype, device=x.device)
    tile = _tile(x.shape[1])
    if len(rows):
        grid = (triton.cdiv(len(rows), tile["ROWS"]),)
        rms_norm_kernel[grid](
            x, rows, weight.contiguous(), out, None, len(rows), x.shape[1], eps, GATHER=True, **tile
        )
    return out


def _builds() -> list[Build]:
    builds = []
    floats = {"inverse": "*fp32:16", "num_rows": "i32", "num_columns": "i32:16"}
    for num_columns in (128, 4096):
        tile = _tile(num_columns)
        warps = tile.pop("num_warps")
        forward = dict.fromkeys(("x", "weight", "out"), "*bf16:16") | floats | {"eps": "fp32"}
        backward = dict.fromkeys(("grad", "x", "weight", "grad_x"), "*bf16:16") | floats
        gathered = {name: kind for name, kind in forward.items() if name != "inverse"} | {"picked": "*i64:16"}
        for name, kernel, signature, constants in (
            ("forward", rms_norm_kernel, forward, {"picked": None, "GATHER": False}),
            ("forward of picked rows", rms_norm_kernel, gathered, {"inverse": None, "GATHER": True}),
            ("backward", rms_norm_backward_kernel, backward | {"partial": "*fp32:16"}, {}),
        ):
            builds.append(Build(f"{name} d={num_columns}", kernel, signature, tile | constants, warps))
    return builds


BUILDS = _builds()
