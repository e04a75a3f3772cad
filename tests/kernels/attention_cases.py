"""Batches of units over pages for the tests of block attention, and the definition as loops in float64."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from tests.kernels.device import DEVICE


@dataclass(frozen=True)
class Case:
    """One batch as lists of a number a unit."""

    name: str
    rows: int
    prefix: tuple[int, ...]
    page_size: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    own_block: int = 1 << 20
    own: tuple[int, ...] | None = None
    suffix: tuple[tuple[int, int], ...] | None = None

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one unit without a past", 8, (0,)),
    Case("whole pages, everything visible", 8, (32,)),
    Case("a page begun, the same for all", 8, (21, 21)),
    Case("ragged prefixes, one empty", 8, (5, 0, 64, 33)),
    Case("small pages", 4, (7, 30), page_size=4),
    Case("pages of 32 and head of 64", 16, (50, 12), page_size=32, heads=2, head_dim=64),
    Case("odd sizes everywhere", 5, (13, 1), page_size=3, heads=6, kv_heads=2, head_dim=40),
    Case("merged commit: two blocks", 16, (24, 24), own_block=8),
    Case("three blocks, ragged", 12, (16, 40), own_block=4),
    Case("blocks that do not divide the rows", 10, (16,), own_block=4),
    Case("several tiles of keys", 8, (150, 77, 0), own_block=4),
    Case("more rows than a tile has", 18, (30, 70), heads=8, kv_heads=2, own_block=8, own=(18, 17)),
    Case("a long suffix", 4, (70, 3), suffix=((100, 250), (3, 90))),
    Case("padding rows", 8, (16, 3, 0), own=(8, 5, 1), own_block=4),
    Case("a unit of padding only", 8, (16, 0), own=(8, 0)),
    Case("infill: suffix in pages of its own", 8, (16, 20), suffix=((32, 41), (48, 64))),
    Case("infill: suffix in the prefix's page", 8, (18, 33), suffix=((24, 30), (36, 47))),
    Case("infill: some without, some touching", 8, (16, 16, 0), suffix=((0, 0), (16, 20), (5, 9))),
    Case("as many heads as kv heads", 8, (40,), heads=3, kv_heads=3),
    Case("one kv head for eight", 3, (40,), heads=8, kv_heads=1),
    Case("head of 128", 4, (20,), heads=2, kv_heads=1, head_dim=128),
    Case("head of 256", 4, (20,), heads=2, kv_heads=1, head_dim=256),
]


@dataclass(frozen=True)
class Inputs:
    """The arguments of `block_attention`, by name and in order."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_pages: torch.Tensor
    value_pages: torch.Tensor
    page_table: torch.Tensor
    prefix: torch.Tensor
    suffix_start: torch.Tensor
    suffix_end: torch.Tensor
    own_len: torch.Tensor
    own_block: int

    def arguments(self) -> list[torch.Tensor | int]:
        return [getattr(self, field.name) for field in fields(self)]


def sees(case: Case, n: int, position: int) -> bool:
    start, end = case.suffix[n] if case.suffix else (0, 0)
    return position < case.prefix[n] or start <= position < end


def make(
    case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device = DEVICE
) -> Inputs:
    """Random numbers of `seed` in a layout that is the case's own; whatever nobody may read is NaN or no page."""
    generator = torch.Generator().manual_seed(seed)
    num, size = len(case.prefix), case.page_size
    longest = [max(p, *(case.suffix[n] if case.suffix else (0,))) for n, p in enumerate(case.prefix)]
    max_pages = -(-max(longest) // size) + 2
    num_pages = num * max_pages + 3
    shape = (num_pages, size, case.kv_heads, case.head_dim)
    key_pages, value_pages = (torch.randn(shape, generator=generator) for _ in range(2))
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
    table = torch.full((num, max_pages), -1, dtype=torch.int32)
    table[:, 1::2] = 1 << 30
    used = torch.zeros(num_pages, size, dtype=torch.bool)
    for n in range(num):
        for position in range(max_pages * size):
            if sees(case, n, position):
                page = free[n * max_pages + position // size]
                table[n, position // size] = page
                used[page, position % size] = True
    key_pages[~used], value_pages[~used] = torch.nan, torch.nan
    own = torch.tensor(case.own or (case.rows,) * num)
    q = torch.randn(num, case.rows, case.heads, case.head_dim, generator=generator)
    k, v = (torch.randn(num, case.rows, case.kv_heads, case.head_dim, generator=generator) for _ in range(2))
    beyond = torch.arange(case.rows) >= own[:, None]
    for tensor in (q, k, v):
        tensor[beyond] = torch.nan
    suffix = torch.tensor(case.suffix or ((0, 0),) * num)
    whole = (torch.tensor(case.prefix), suffix[:, 0], suffix[:, 1], own)
    return Inputs(
        *(tensor.to(device, dtype) for tensor in (q, k, v, key_pages, value_pages)),
        table.to(device),
        *(numbers.to(device, torch.int32) for numbers in whole),
        case.own_block,
    )


def exact(case: Case, inputs: Inputs) -> torch.Tensor:
    """float64 [N, r, H, D] by loops over units, rows and heads."""
    q, k, v, key_pages, value_pages = (
        tensor.double().cpu()
        for tensor in (inputs.q, inputs.k, inputs.v, inputs.key_pages, inputs.value_pages)
    )
    table, own_len = inputs.page_table.tolist(), inputs.own_len.tolist()
    out = torch.zeros(q.shape, dtype=torch.float64)
    size, group = case.page_size, case.heads // case.kv_heads
    for n in range(len(q)):
        cached = [p for p in range(len(table[n]) * size) if sees(case, n, p)]
        for i in range(own_len[n]):
            rows = [j for j in range(own_len[n]) if j // case.own_block <= i // case.own_block]
            keys = [key_pages[table[n][p // size], p % size] for p in cached] + [k[n, j] for j in rows]
            values = [value_pages[table[n][p // size], p % size] for p in cached] + [v[n, j] for j in rows]
            for h in range(case.heads):
                key, value = (torch.stack(all_)[:, h // group] for all_ in (keys, values))
                weight = (key @ q[n, i, h] / case.head_dim**0.5).softmax(0)
                out[n, i, h] = weight @ value
    return out
