"""Attention, rotation and commit as an 8 B model's denoising step asks for them: 32 heads of 128, 8 kv heads, blocks of 32."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from cases import Case, Inputs, Outputs

from fewstep.kernels.attention import block_attention
from fewstep.kernels.confidence import POLICY_KINDS, Candidates, CanvasBlock, PolicyTensors, commit
from fewstep.kernels.rope import apply_rope, rope_and_write, rope_table

PAGE = 32


def cases(smoke: bool) -> list[Case]:
    if smoke:
        shapes = [(2, 4, 8, 4, 40), (2, 8, 8, 4, 40)]
        return [
            *(
                attention_case(units, rows, prefix, block, 4, 2, width)
                for units, rows, prefix, block, width in shapes
            ),
            rotation_case(6, 4, 32),
            write_case(6, 2, 32),
            commit_case(4, 8),
        ]
    return [
        attention_case(1, 32, 1024, 32),
        attention_case(4, 32, 1024, 32),
        attention_case(16, 32, 1024, 32, compiled=True),
        attention_case(1, 32, 8192, 32),
        attention_case(16, 64, 1024, 32),
        rotation_case(512, 32, 128, compiled=True),
        write_case(512, 8, 128, compiled=True),
        commit_case(16, 32),
        commit_case(256, 32, compiled=True),
    ]


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def attention_case(
    units: int,
    rows: int,
    prefix: int,
    own_block: int,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    compiled: bool = False,
) -> Case:
    """Units of `rows` rows behind `prefix` cached positions each; rows > own_block = a merged commit."""
    pages = -(-prefix // PAGE)

    def make(device: torch.device, seed: int) -> Inputs:
        draw = partial(torch.randn, generator=_generator(device, seed), device=device, dtype=_dtype(device))
        q, k, v = (draw(units, rows, n, head_dim) for n in (heads, kv_heads, kv_heads))
        stores = [draw(units * pages, PAGE, kv_heads, head_dim) for _ in range(2)]
        order = torch.randperm(units * pages, generator=torch.Generator().manual_seed(seed))
        table = order.view(units, pages).to(device, torch.int32)
        lengths = [torch.full((units,), n, dtype=torch.int32, device=device) for n in (prefix, 0, 0, rows)]
        block = torch.arange(rows, device=device) // own_block
        own = block[:, None] >= block
        seen = torch.cat((torch.ones(rows, prefix, dtype=torch.bool, device=device), own), dim=1)
        return (q, k, v, *stores, table, *lengths, None if bool(own.all()) else seen)

    def run(inputs: Inputs, impl: str) -> Outputs:
        return (block_attention(*inputs[:-1], own_block, impl=impl),)

    def gathered(inputs: Inputs) -> Outputs:
        q, k, v, key_pages, value_pages, table, *_, seen = inputs
        keys, values = (
            torch.cat((store[table.long()].flatten(1, 2)[:, :prefix], own), dim=1).transpose(1, 2)
            for store, own in ((key_pages, k), (value_pages, v))
        )
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=seen, enable_gqa=heads != kv_heads
        )
        return (out.transpose(1, 2),)

    blocks = [min(rows, (row // own_block + 1) * own_block) for row in range(rows)]
    return Case(
        op="block_attention",
        name=f"{units}x{rows} rows, {prefix} cached, blocks of {own_block}",
        settings={
            "units": units,
            "rows": rows,
            "prefix": prefix,
            "own_block": own_block,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "page_size": PAGE,
        },
        make=make,
        run=run,
        eager=gathered,
        num_bytes=2 * units * head_dim * (2 * kv_heads * (prefix + rows) + 2 * heads * rows),
        flop=4 * units * heads * head_dim * sum(prefix + seen for seen in blocks),
        compiled=compiled,
    )


def _angles(rows: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rope_table(head_dim, 4096, 1e6)
    position = torch.arange(rows) * 7 % 4096
    return cos[position].to(device), sin[position].to(device)


def rotation_case(rows: int, heads: int, head_dim: int, compiled: bool = False) -> Case:
    """Queries of one layer."""

    def make(device: torch.device, seed: int) -> Inputs:
        x = torch.randn(
            rows, heads, head_dim, generator=_generator(device, seed), device=device, dtype=_dtype(device)
        )
        return (x, *(angle[:, None] for angle in _angles(rows, head_dim, device)))

    return Case(
        op="apply_rope",
        name=f"{rows} rows of {heads} x {head_dim}",
        settings={"rows": rows, "heads": heads, "head_dim": head_dim},
        make=make,
        run=lambda inputs, impl: (apply_rope(*inputs, impl=impl),),
        num_bytes=rows * (2 * 2 * heads * head_dim + 4 * head_dim),
        flop=3 * rows * heads * head_dim,
        compiled=compiled,
    )


def write_case(rows: int, kv_heads: int, head_dim: int, compiled: bool = False) -> Case:
    """Keys of one layer, all of them final: the forward that ends a block of every sequence."""
    pages = -(-rows // PAGE) + 1

    def make(device: torch.device, seed: int) -> Inputs:
        draw = partial(torch.randn, generator=_generator(device, seed), device=device, dtype=_dtype(device))
        k, v = (draw(rows, kv_heads, head_dim) for _ in range(2))
        stores = [
            torch.zeros(pages, PAGE, kv_heads, head_dim, device=device, dtype=k.dtype) for _ in range(2)
        ]
        destination = torch.randperm(pages * PAGE, generator=torch.Generator().manual_seed(seed))[:rows]
        return (k, v, *_angles(rows, head_dim, device), destination.to(device), *stores)

    def written(inputs: Inputs) -> Outputs:
        k, v, cos, sin, destination, key_pages, value_pages = inputs
        k = apply_rope(k, cos[:, None], sin[:, None], impl="reference")
        key_pages.flatten(0, 1).index_copy_(0, destination, k)
        value_pages.flatten(0, 1).index_copy_(0, destination, v)
        return k, key_pages, value_pages

    return Case(
        op="rope_and_write",
        name=f"{rows} rows of {kv_heads} x {head_dim}",
        settings={"rows": rows, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": PAGE},
        make=make,
        run=lambda inputs, impl: (rope_and_write(*inputs, impl=impl), inputs[5], inputs[6]),
        eager=written,
        num_bytes=rows * (2 * 5 * kv_heads * head_dim + 4 * head_dim + 8),
        flop=3 * rows * kv_heads * head_dim,
        compiled=compiled,
    )


def commit_case(sequences: int, block: int, compiled: bool = False) -> Case:
    """Every kind of policy in one batch, half of the block masked, editing on."""

    def make(device: torch.device, seed: int) -> Inputs:
        generator = _generator(device, seed)
        uniform = partial(torch.rand, generator=generator, device=device)
        tokens, candidates = (
            torch.randint(1000, (sequences, block), generator=generator, device=device) for _ in range(2)
        )
        kind = torch.arange(sequences, device=device) % len(POLICY_KINDS)
        everywhere = torch.ones(sequences, block, dtype=torch.bool, device=device)
        ends = torch.tensor([[0, -1]], device=device).repeat(sequences, 1)
        return (
            CanvasBlock(tokens, uniform(sequences, block) < 0.5, everywhere, ends, 0),
            Candidates(candidates, uniform(sequences, block), 3 * uniform(sequences, block)),
            PolicyTensors(
                kind.to(torch.int8),
                torch.tensor([0.9, 0.0, 0.5, 1.0], device=device)[kind],
                torch.ones(sequences, dtype=torch.int64, device=device),
                torch.full((sequences,), 0.9, device=device),
                everywhere[:, 0].clone(),
            ),
        )

    return Case(
        op="commit",
        name=f"{sequences} blocks of {block}, four policies",
        settings={"sequences": sequences, "block": block},
        make=make,
        run=lambda inputs, impl: tuple(commit(*inputs, impl=impl)),
        # Tokens, candidates and new tokens of 8 bytes, confidence and entropy of 4, five flags; 54 a sequence beside them.
        num_bytes=sequences * (block * (3 * 8 + 2 * 4 + 5) + 54),
        flop=4 * sequences * block * block,
        tolerance=0.0,
        compiled=compiled,
    )
