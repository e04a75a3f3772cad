"""Block attention in one pass over pages and own rows: online softmax, grouped queries, splits for few long units.

Derivation, bytes and FLOP: README.md. Shape legend: N units, r rows, H heads, K kv heads, G = H / K, D head dimension,
P pages, s page size, S splits. A program serves one kv head of one unit: its G·r query rows share every key it loads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from fewstep.kernels.launch import Build

# exp(x) = exp2(x · log2 e): the hardware has exp2.
_LOG2_E = 1.4426950408889634
# Cached positions a split should have: below it, writing and joining partial results costs more than the loop it saves.
_SPLIT_POSITIONS = 256
_MAX_SPLITS = 32


@triton.jit
def _share_of_split(num_cached, KEYS: tl.constexpr):
    """First and last of the cached positions of this split: whole tiles, dealt out evenly."""
    share = tl.cdiv(tl.cdiv(num_cached, KEYS), tl.num_programs(2)) * KEYS
    first = tl.program_id(2) * share
    return first, tl.minimum(first + share, num_cached)


@triton.jit
def _normalised(acc, total, real):
    """acc [M, D] / total [M] of real rows; 0 for padding rows, whose sum may be 0."""
    return tl.where(real[:, None], acc / tl.where(real, total, 1.0)[:, None], 0.0)


@triton.jit
def _absorb(acc, top, total, query, key_at, value_at, shown, seen, inside, scale, PRECISION: tl.constexpr):
    """One tile of N' keys and values into the running softmax: acc [M, D], top and total [M].

    shown [N'] may be loaded, seen [M, N'] is what each row sees of it. What is not shown is 0 and never loaded, so that a
    NaN there cannot come through as 0 · NaN.
    """
    key = tl.load(key_at, mask=shown[None, :] & inside[:, None], other=0.0)
    scores = tl.dot(query, key, input_precision=PRECISION) * scale
    scores = tl.where(seen, scores, float("-inf"))
    above = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet has -inf on both sides.
    base = tl.where(above == float("-inf"), 0.0, above)
    weight = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    value = tl.load(value_at, mask=shown[:, None] & inside[None, :], other=0.0)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return acc, above, total * shrink + tl.sum(weight, 1)


@triton.jit
def block_attention_kernel(
    q, k, v, key_pages, value_pages, page_table, prefix, suffix_start, suffix_end, own_len,
    out, partial, partial_top, partial_total, num_rows, own_block, max_pages, scale,
    PAGE: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (N·K, tiles of ROWS of the G·r query rows, S); split 0 also takes the own rows.

    Writes out [N, r, H, D]; if SPLIT, the unnormalised partial [S, N, r, H, D], its maximum and its sum [S, N, r, H].
    """
    unit = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(0) % KV_HEADS
    own = tl.load(own_len + unit)
    # Query rows in the order (row, head of the group), in which they lie in memory.
    packed = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = packed // GROUP
    width, column = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    inside = width < HEAD
    row_at = (unit * num_rows + row) * (KV_HEADS * GROUP) + kv_head * GROUP + packed % GROUP
    at = row_at[:, None] * HEAD + width[None, :]
    query = tl.load(q + at, mask=(row < own)[:, None] & inside[None, :], other=0.0)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)

    # Cached positions are counted through, the suffix behind the prefix; this split has those from first to last.
    end = tl.load(prefix + unit)
    start = tl.maximum(tl.load(suffix_start + unit), end)
    first, last = _share_of_split(end + tl.maximum(tl.load(suffix_end + unit) - start, 0), KEYS)
    for tile in range(first, last, KEYS):
        shown = tile + column < last
        position = tile + column + tl.where(tile + column < end, 0, start - end)
        page = tl.load(page_table + unit * max_pages + position // PAGE, mask=shown, other=0)
        key_at = ((page.to(tl.int64) * PAGE + position % PAGE) * KV_HEADS + kv_head) * HEAD
        acc, top, total = _absorb(
            acc, top, total, query, key_pages + key_at[None, :] + width[:, None],
            value_pages + key_at[:, None] + width[None, :], shown, shown[None, :], inside, scale, PRECISION,
        )  # fmt: skip

    if tl.program_id(2) == 0:
        # Rows of this tile see own rows up to the end of the block of its last one.
        final = (tl.program_id(1) * ROWS + ROWS - 1) // GROUP
        seen_end = tl.minimum(own, (final // own_block + 1) * own_block)
        for tile in range(0, seen_end, KEYS):
            shown = tile + column < seen_end
            seen = shown[None, :] & (((tile + column) // own_block)[None, :] <= (row // own_block)[:, None])
            key_at = ((unit * num_rows + tile + column) * KV_HEADS + kv_head) * HEAD
            acc, top, total = _absorb(
                acc, top, total, query, k + key_at[None, :] + width[:, None],
                v + key_at[:, None] + width[None, :], shown, seen, inside, scale, PRECISION,
            )  # fmt: skip

    stored = row < num_rows
    whole = stored[:, None] & inside[None, :]
    if SPLIT:
        row_at += tl.program_id(2) * tl.num_programs(0).to(tl.int64) * GROUP * num_rows
        tl.store(partial_top + row_at, top, mask=stored)
        tl.store(partial_total + row_at, total, mask=stored)
        tl.store(partial + row_at[:, None] * HEAD + width[None, :], acc, mask=whole)
    else:
        tl.store(out + at, _normalised(acc, total, row < own).to(out.dtype.element_ty), mask=whole)


@triton.jit
def join_splits_kernel(
    partial, partial_top, partial_total, own_len, out, num_splits, num_outputs, num_rows,
    HEADS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out of the splits' partial results: one program an output row of D numbers, [N·r·H] of them."""
    which = tl.program_id(0).to(tl.int64)
    split, width = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    there = split < num_splits
    at = split.to(tl.int64) * num_outputs + which
    top = tl.load(partial_top + at, mask=there, other=float("-inf"))
    highest = tl.max(top, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(top - highest)
    total = tl.sum(weight * tl.load(partial_total + at, mask=there, other=0.0), 0)
    seen = (top > float("-inf"))[:, None] & (width < HEAD)[None, :]
    parts = tl.load(partial + at[:, None] * HEAD + width[None, :], mask=seen, other=0.0)
    result = tl.sum(parts * weight[:, None], 0)
    row = which // HEADS
    real = row % num_rows < tl.load(own_len + row // num_rows)
    result = tl.where(real, result / tl.where(real, total, 1.0), 0.0)
    tl.store(out + which * HEAD + width, result.to(out.dtype.element_ty), mask=width < HEAD)


def _tile(packed_rows: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes, warps and stages for G·r query rows: what runs without spilling on sm_80, sm_90 and sm_100."""
    width = max(16, triton.next_power_of_2(head_dim))
    rows = max(16, triton.next_power_of_2(packed_rows))
    if dtype == torch.float32:
        # Products in float32, no tensor cores: their 10-bit mantissas would show. Larger tiles spill.
        big = width >= 128
        tile = {
            "ROWS": min(32, rows),
            "KEYS": 16 if big else 32,
            "num_warps": 8 if big else 4,
            "num_stages": 2,
        }
    else:
        big = width >= 256
        tile = {
            "ROWS": min(64, rows),
            "KEYS": 32 if big else 64,
            "num_warps": 8 if big else 4,
            "num_stages": 2 if big else 3,
        }
    return tile | {"WIDTH": width, "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_splits(programs: int, max_positions: int, device: torch.device) -> int:
    """Splits that give every multiprocessor two programs, as far as there are positions for them.

    Decided by the page table's width, which is on the host; the cached positions there are, are dealt out evenly on the
    device. So nothing has to be read back, and a CUDA graph stays valid while prefixes grow.
    """
    if device.type != "cuda":
        return 1
    wanted = -(-2 * _num_processors(device) // programs)
    return max(1, min(wanted, max_positions // _SPLIT_POSITIONS, _MAX_SPLITS))


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    prefix: torch.Tensor,
    suffix_start: torch.Tensor,
    suffix_end: torch.Tensor,
    own_len: torch.Tensor,
    own_block: int,
    num_splits: int | None = None,
) -> torch.Tensor:
    """See `fewstep.kernels.attention.block_attention`; num_splits: None = by the size of the device."""
    num_units, num_rows, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k.shape[2], key_pages.shape[1]
    q, k, v, page_table = q.contiguous(), k.contiguous(), v.contiguous(), page_table.contiguous()
    key_pages, value_pages = key_pages.contiguous(), value_pages.contiguous()
    out = torch.empty_like(q)
    if not q.numel():
        return out
    group = num_heads // num_kv_heads
    tile = _tile(group * num_rows, head_dim, q.dtype)
    grid = (num_units * num_kv_heads, triton.cdiv(group * num_rows, tile["ROWS"]))
    if num_splits is None:
        num_splits = _num_splits(grid[0] * grid[1], page_table.shape[1] * page_size, q.device)
    partial = _partial_results(num_splits, q)
    block_attention_kernel[(*grid, num_splits)](
        q, k, v, key_pages, value_pages, page_table, prefix, suffix_start, suffix_end, own_len, out, *partial,
        num_rows, min(own_block, num_rows), page_table.shape[1], _LOG2_E * head_dim**-0.5,
        PAGE=page_size, GROUP=group, KV_HEADS=num_kv_heads, HEAD=head_dim, SPLIT=num_splits > 1, **tile,
    )  # fmt: skip
    if num_splits > 1:
        num_outputs = num_units * num_rows * num_heads
        join_splits_kernel[(num_outputs,)](
            *partial, own_len, out, num_splits, num_outputs, num_rows,
            HEADS=num_heads, HEAD=head_dim, WIDTH=tile["WIDTH"], SPLITS=triton.next_power_of_2(num_splits),
            num_warps=1 if head_dim <= 128 else 2,
        )  # fmt: skip
    return out


def _partial_results(num_splits: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for partial [S, N, r, H, D], its maximum and its sum [S, N, r, H]; empty for one split."""
    shape = (num_splits, *q.shape[:-1]) if num_splits > 1 else (0,)
    top = torch.empty(shape, dtype=torch.float32, device=q.device)
    partial = torch.empty((*shape, q.shape[-1]), dtype=torch.float32, device=q.device)
    return partial, top, torch.empty_like(top)


def _builds() -> list[Build]:
    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    numbers = ("page_table", "prefix", "suffix_start", "suffix_end", "own_len")
    builds = []
    for dtype, head_dim, group, kv_heads, rows, split in (
        (torch.bfloat16, 128, 4, 8, 32, False),
        (torch.bfloat16, 128, 4, 8, 32, True),
        (torch.bfloat16, 64, 3, 4, 32, False),
        (torch.bfloat16, 256, 8, 1, 32, True),
        (torch.float32, 32, 1, 4, 16, False),
        (torch.float32, 128, 4, 8, 32, True),
    ):
        tile = _tile(group * rows, head_dim, dtype)
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        values = dict.fromkeys(("q", "k", "v", "key_pages", "value_pages", "out"), f"*{names[dtype]}:16")
        whole = dict.fromkeys(numbers, "*i32:16") | dict.fromkeys(
            ("num_rows", "own_block", "max_pages"), "i32"
        )
        partial = dict.fromkeys(("partial", "partial_top", "partial_total"), "*fp32:16")
        shape = {"PAGE": 32, "GROUP": group, "KV_HEADS": kv_heads, "HEAD": head_dim, "SPLIT": split}
        name = f"{names[dtype]} D={head_dim} G={group} r={rows}{' split' * split}"
        builds.append(
            Build(
                name,
                block_attention_kernel,
                values | whole | partial | {"scale": "fp32"},
                shape | tile,
                warps,
                stages,
            )
        )
    builds.append(
        Build(
            "join bf16 D=128 S=16",
            join_splits_kernel,
            partial
            | {"own_len": "*i32:16", "out": "*bf16:16"}
            | dict.fromkeys(("num_splits", "num_outputs", "num_rows"), "i32"),
            {"HEADS": 32, "HEAD": 128, "WIDTH": 128, "SPLITS": 16},
            1,
        )
    )
    return builds


BUILDS = _builds()
