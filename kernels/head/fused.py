"""The masked-row head without logits in memory: two kernels. Derivation, bytes and FLOP: README.md.

Shape legend: M masked rows, V vocabulary, d hidden, T vocabulary tiles, C parts a tile is cut into for drawing.

`head_partial_kernel` projects a tile of rows on a tile of the vocabulary and keeps a few numbers of each row and tile.
`head_finish_kernel` joins a row's tiles; where the row samples it finds the part of the vocabulary in which the tempered
CDF crosses u, projects the row on that part once more and takes the token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fewstep.kernels.confidence import RowStats
from fewstep.kernels.launch import Build

# Row tiles that sweep the vocabulary side by side. They read the same weights at the same time, from L2 but for the
# first; 16 tiles of 128 rows by 4,096 bf16 numbers are 16 MiB, which L2 holds on to for the whole sweep.
GROUP = 16
# Tokens of a part: what a sampling row projects twice. 32 rows of d = 4,096 draw for 8 MiB of weights read again,
# beside 1 GiB for V = 126,464.
PART = 32
# The finishing program takes 512 tiles, or parts of tiles, at a time, four a thread; its draw multiplies 128 numbers of a
# row with those of the 32 tokens of a part, 32 products a thread.
_FINISH = {"BLOCK": 512, "DEPTH": 128}


@triton.jit
def tile_of_program(num_row_tiles, num_tiles, GROUP: tl.constexpr):
    """(row tile, vocabulary tile) of this program: row tiles fastest, within groups of GROUP."""
    program = tl.program_id(0)
    group = program // (GROUP * num_tiles)
    size = tl.minimum(num_row_tiles - group * GROUP, GROUP)
    rest = program - group * GROUP * num_tiles
    return group * GROUP + rest % size, rest // size


@triton.jit
def tile_logits(
    hidden, row_start, weight, tokens, width, vocabulary, mask_token,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """float32 logits of `tokens`, of the rows whose numbers start at hidden + row_start; tokens lie along AXIS.

    The tensor cores of Hopper and Blackwell want 64 or 128 lines on the left. A block of masks has 32 rows, so there
    the weights go left: [TOKENS, ROWS], AXIS 0. Many rows go left themselves: [ROWS, TOKENS], AXIS 1, where a thread
    holds few rows and reduces each in its own registers.

    A token outside the vocabulary or equal to `mask_token` gets -inf. EVEN: DEPTH divides width.
    """
    depth = tl.arange(0, DEPTH)
    safe = tl.minimum(tokens, vocabulary - 1).to(tl.int64)
    if AXIS == 0:
        left = weight + safe[:, None] * width + depth[None, :]
        right = hidden + row_start[None, :] + depth[:, None]
        logits = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
    else:
        left = hidden + row_start[:, None] + depth[None, :]
        right = weight + safe[None, :] * width + depth[:, None]
        logits = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for start in range(0, width, DEPTH):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = depth < width - start
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision="ieee")
        left += DEPTH
        right += DEPTH
    allowed = (tokens < vocabulary) & (tokens != mask_token)
    return tl.where(tl.expand_dims(allowed, 1 - AXIS), logits, float("-inf"))


@triton.jit
def finite_shift(top):
    """What to subtract before exp: the maximum, or 0 where nothing is allowed, so that -inf - -inf never is."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def mass_times_distance(mass, distance):
    """e^x · x with its limit 0 at x = -inf."""
    return mass * tl.where(mass > 0, distance, 0.0)


@triton.jit
def head_partial_kernel(
    hidden, rows, weight, temperature, best, token, total, moment, tempered, num_rows, vocabulary,
    width, mask_token, num_row_tiles, num_tiles,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, AXIS: tl.constexpr, ENTROPY: tl.constexpr,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """Of each row and tile: best logit and its token, Σ e^x and Σ e^x·x over x = logit - best, all [M, T].

    SAMPLE also writes Σ e^(x / temperature) of every part of the tile, tempered [M, T · C].
    """
    row_tile, tile = tile_of_program(num_row_tiles, num_tiles, GROUP)
    index = row_tile * ROWS + tl.arange(0, ROWS)
    real = index < num_rows
    safe = tl.minimum(index, num_rows - 1)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    start = tl.load(rows + safe) * width
    logits = tile_logits(
        hidden, start, weight, tokens, width, vocabulary, mask_token, TOKENS, ROWS, DEPTH, EVEN, AXIS
    )
    top = tl.max(logits, axis=AXIS)
    # The lowest of the best; a row of NaN has none, and any token will do for it.
    is_best = logits == tl.expand_dims(top, AXIS)
    first = tl.min(tl.where(is_best, tl.expand_dims(tokens, 1 - AXIS), vocabulary - 1), axis=AXIS)
    distance = logits - tl.expand_dims(finite_shift(top), AXIS)
    mass = tl.exp(distance)
    where = index.to(tl.int64) * num_tiles + tile
    tl.store(best + where, top, mask=real)
    tl.store(token + where, first, mask=real)
    tl.store(total + where, tl.sum(mass, axis=AXIS), mask=real)
    if ENTROPY:
        tl.store(moment + where, tl.sum(mass_times_distance(mass, distance), axis=AXIS), mask=real)
    if SAMPLE:
        heat = tl.load(temperature + safe)
        mass = tl.exp(distance / tl.expand_dims(tl.where(heat > 0, heat, 1.0), AXIS))
        if AXIS == 0:
            parts = tl.sum(tl.reshape(mass, [TOKENS // PART, PART, ROWS]), axis=1)
        else:
            parts = tl.sum(tl.reshape(mass, [ROWS, TOKENS // PART, PART]), axis=2)
        offset = tl.expand_dims(tl.arange(0, TOKENS // PART), 1 - AXIS)
        place = tl.expand_dims(where, AXIS) * (TOKENS // PART) + offset
        tl.store(tempered + place, parts, mask=tl.expand_dims(real, AXIS))


@triton.jit
def part_logits(
    hidden, row_start, weight, tokens, width, vocabulary, mask_token, PART: tl.constexpr, DEPTH: tl.constexpr
):
    """float32 [PART]: logits of `tokens`, of the one row that starts at hidden + row_start."""
    depth = tl.arange(0, DEPTH)
    safe = tl.minimum(tokens, vocabulary - 1).to(tl.int64)
    products = tl.zeros([PART, DEPTH], dtype=tl.float32)
    for start in range(0, width, DEPTH):
        inside = depth < width - start
        x = tl.load(hidden + row_start + start + depth, mask=inside, other=0.0).to(tl.float32)
        place = safe[:, None] * width + start + depth[None, :]
        w = tl.load(weight + place, mask=inside[None, :], other=0.0).to(tl.float32)
        products += w * x[None, :]
    allowed = (tokens < vocabulary) & (tokens != mask_token)
    return tl.where(allowed, tl.sum(products, axis=1), float("-inf"))


@triton.jit
def crossing_part(tempered, best, row, top, heat, u, num_tiles, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The first part at which the tempered CDF exceeds u, and how much of its own mass is to be passed there.

    The mass is relative to the part's tile, Σ e^((logit - best of the tile) / heat). Summed in float64, as the
    reference does.
    """
    block = tl.arange(0, BLOCK)
    num_parts = num_tiles * PARTS
    whole = tl.zeros([], dtype=tl.float64)
    for first in range(0, num_parts, BLOCK):
        part = first + block
        inside = part < num_parts
        tile = row * num_tiles + part // PARTS
        distance = tl.load(best + tile, mask=inside, other=float("-inf")) - finite_shift(top)
        mass = tl.load(tempered + row * num_parts + part, mask=inside, other=0.0)
        whole += tl.sum((mass * tl.exp(distance / heat)).to(tl.float64), axis=0)
    target = whole * u
    passed = tl.zeros([], dtype=tl.float64)
    before = tl.zeros([], dtype=tl.float64)
    crossing = tl.zeros([], dtype=tl.int32)
    for first in range(0, num_parts, BLOCK):
        part = first + block
        inside = part < num_parts
        tile = row * num_tiles + part // PARTS
        distance = tl.load(best + tile, mask=inside, other=float("-inf")) - finite_shift(top)
        mass = tl.load(tempered + row * num_parts + part, mask=inside, other=0.0)
        cumulative = passed + tl.cumsum((mass * tl.exp(distance / heat)).to(tl.float64), axis=0)
        below = (cumulative <= target) & inside
        crossing += tl.sum(below.to(tl.int32), axis=0)
        before = tl.maximum(before, tl.max(tl.where(below, cumulative, 0.0), axis=0))
        passed = tl.max(cumulative, axis=0)
    crossing = tl.minimum(crossing, num_parts - 1)
    scale = tl.exp((tl.load(best + row * num_tiles + crossing // PARTS) - finite_shift(top)) / heat)
    return crossing, ((target - before) / scale.to(tl.float64)).to(tl.float32)


@triton.jit
def joined_tiles(
    best, token, total, moment, row, vocabulary, num_tiles, BLOCK: tl.constexpr, ENTROPY: tl.constexpr
):
    """(maximum, its lowest token, Σ e^x, Σ e^x·x over x = logit - maximum) of a row, from its tiles'."""
    block = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for first in range(0, num_tiles, BLOCK):
        tile = first + block
        value = tl.load(best + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
        tops = tl.maximum(tops, value)
    top = tl.max(tops, axis=0)
    masses = tl.zeros([BLOCK], dtype=tl.float32)
    moments = tl.zeros([BLOCK], dtype=tl.float32)
    tokens = tl.full([BLOCK], 0, dtype=tl.int32) + vocabulary - 1
    for first in range(0, num_tiles, BLOCK):
        tile = first + block
        inside = tile < num_tiles
        where = row * num_tiles + tile
        value = tl.load(best + where, mask=inside, other=float("-inf"))
        distance = value - finite_shift(top)
        scale = tl.exp(distance)
        mass = tl.load(total + where, mask=inside, other=0.0) * scale
        masses += mass
        if ENTROPY:
            own = tl.load(moment + where, mask=inside, other=0.0)
            moments += own * scale + mass_times_distance(mass, distance)
        candidate = tl.load(token + where, mask=inside, other=0)
        tokens = tl.minimum(tokens, tl.where(inside & (value == top), candidate, vocabulary - 1))
    return top, tl.min(tokens, axis=0), tl.sum(masses, axis=0), tl.sum(moments, axis=0)


@triton.jit
def head_finish_kernel(
    hidden, rows, weight, temperature, uniform, best, token, total, moment, tempered,
    out_token, out_confidence, out_logprob, out_entropy, vocabulary, width, mask_token, num_tiles,
    TOKENS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    ENTROPY: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """One row a program: its tiles joined, and a draw where its temperature is above 0."""
    row = tl.program_id(0).to(tl.int64)
    top, chosen, mass, moments = joined_tiles(
        best, token, total, moment, row, vocabulary, num_tiles, BLOCK, ENTROPY
    )
    log_mass = tl.log(mass)
    # The best token's own term is e^0.
    logprob = -log_mass
    if ENTROPY:
        tl.store(out_entropy + row, log_mass - moments / mass)
    if SAMPLE:
        heat = tl.load(temperature + row)
        if heat > 0:
            part, left = crossing_part(
                tempered, best, row, top, heat, tl.load(uniform + row), num_tiles, TOKENS // PART, BLOCK
            )
            start = tl.load(rows + row) * width
            offset = tl.arange(0, PART)
            logits = part_logits(
                hidden, start, weight, part * PART + offset, width, vocabulary, mask_token, PART, DEPTH
            )
            shift = finite_shift(tl.load(best + row * num_tiles + part // (TOKENS // PART)))
            weights = tl.exp((logits - shift) / heat)
            # A token of weight 0 repeats the sum before it and so is never first above a target of 0 or more.
            below = tl.cumsum(weights, axis=0) <= tl.maximum(left, 0.0)
            # Rounding may leave the target above the whole part; then its last token with any weight.
            last = tl.max(tl.where(weights > 0, offset, 0), axis=0)
            pick = tl.minimum(tl.sum(below.to(tl.int32), axis=0), last)
            chosen = tl.minimum(part * PART + pick, vocabulary - 1)
            logprob = tl.sum(tl.where(offset == pick, logits, 0.0), axis=0) - finite_shift(top) - log_mass
    tl.store(out_token + row, chosen.to(tl.int64))
    tl.store(out_logprob + row, logprob)
    tl.store(out_confidence + row, tl.exp(logprob))


def projection_tile(num_rows: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile of `tile_logits` for a number of rows: constants, warps and pipeline stages.

    128 tokens of 64 bf16 numbers are 16 KiB a stage; four stages and two programs a multiprocessor keep 128 KiB of
    weights on the way, several times what 3 TB/s and 1 µs of latency ask of one multiprocessor (25 KiB).
    """
    wide = dtype.itemsize > 2
    rows = min(64 if wide else 128, max(16, triton.next_power_of_2(num_rows)))
    depth = 32 if wide else 64
    return {
        "ROWS": rows,
        "TOKENS": 128,
        "DEPTH": depth,
        "EVEN": width % depth == 0,
        "AXIS": 1 if rows > 32 else 0,
        "num_warps": 8 if rows > 32 else 4,
        "num_stages": 3 if wide else 4,
    }


def head_confidence(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    mask_token_id: int | None,
    temperature: torch.Tensor,
    uniform: torch.Tensor | None,
    entropy: bool,
) -> RowStats:
    """See `fewstep.kernels.head.head_confidence`; `hidden` is final-normed and every top_p is 1."""
    hidden, weight, rows = hidden.contiguous(), weight.contiguous(), rows.contiguous()
    if uniform is not None:
        # One number expanded to all rows has stride 0; the kernels count from row to row.
        temperature, uniform = temperature.contiguous(), uniform.contiguous()
    num_rows, (vocabulary, width) = len(rows), weight.shape
    tile = projection_tile(num_rows, width, weight.dtype)
    num_row_tiles, num_tiles = triton.cdiv(num_rows, tile["ROWS"]), triton.cdiv(vocabulary, tile["TOKENS"])
    sample = uniform is not None

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    best, total = floats(num_rows, num_tiles), floats(num_rows, num_tiles)
    token = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=hidden.device)
    moment = floats(num_rows, num_tiles) if entropy else None
    tempered = floats(num_rows, num_tiles * (tile["TOKENS"] // PART)) if sample else None
    stats = RowStats(
        torch.empty(num_rows, dtype=torch.int64, device=hidden.device),
        floats(num_rows),
        floats(num_rows),
        floats(num_rows) if entropy else None,
    )
    if num_rows == 0:
        return stats
    mask_token = -1 if mask_token_id is None else mask_token_id
    heat = temperature if sample else None
    partial = (best, token, total, moment, tempered)
    flags = {"PART": PART, "ENTROPY": entropy, "SAMPLE": sample}
    sizes = (num_rows, vocabulary, width, mask_token, num_row_tiles, num_tiles)
    head_partial_kernel[(num_row_tiles * num_tiles,)](
        hidden, rows, weight, heat, *partial, *sizes, GROUP=GROUP, **flags, **tile
    )
    shape = (vocabulary, width, mask_token, num_tiles)
    head_finish_kernel[(num_rows,)](
        hidden,
        rows,
        weight,
        heat,
        uniform,
        *partial,
        *stats,
        *shape,
        TOKENS=tile["TOKENS"],
        **flags,
        **_FINISH,
    )
    return stats


def _builds() -> list[Build]:
    partial = {"best": "*fp32:16", "token": "*i32:16", "total": "*fp32:16"}
    scalars = {"vocabulary": "i32:16", "width": "i32:16", "mask_token": "i32", "num_tiles": "i32"}
    counts = {"num_rows": "i32", "num_row_tiles": "i32"}
    results = {"out_token": "*i64:16", "out_confidence": "*fp32:16", "out_logprob": "*fp32:16"}
    of_entropy = {"moment": "*fp32:16", "out_entropy": "*fp32:16"}
    of_draw = {"tempered": "*fp32:16", "temperature": "*fp32:16", "uniform": "*fp64:16"}
    builds: list[Build] = []
    for dtype, num_rows, entropy, sample in (
        (torch.bfloat16, 32, False, False),
        (torch.bfloat16, 32, True, True),
        (torch.bfloat16, 512, False, False),
        (torch.bfloat16, 512, True, True),
        (torch.float32, 512, True, True),
    ):
        kind, name = ("*fp32:16", "fp32") if dtype == torch.float32 else ("*bf16:16", "bf16")
        tile = projection_tile(num_rows, 4096, dtype)
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        signature = partial | scalars | {"hidden": kind, "weight": kind, "rows": "*i64:16"}
        absent: dict[str, None] = {}
        for wanted, arguments in ((entropy, of_entropy), (sample, of_draw)):
            signature |= arguments if wanted else {}
            absent |= {} if wanted else dict.fromkeys(arguments)
        flags: dict[str, Any] = {"PART": PART, "ENTROPY": entropy, "SAMPLE": sample} | absent
        if num_rows <= tile["ROWS"]:
            flags["num_row_tiles"] = 1  # a launch turns arguments that are 1 into constants
        what = f"{name} {'entropy draw' if sample else 'greedy'}"
        for title, kernel, types, constants, num_warps, num_stages in (
            (
                f"partial {what} rows={num_rows}",
                head_partial_kernel,
                counts,
                tile | {"GROUP": GROUP},
                warps,
                stages,
            ),
            (f"finish {what}", head_finish_kernel, results, _FINISH | {"TOKENS": tile["TOKENS"]}, 4, 2),
        ):
            if title in {build.name for build in builds}:
                continue
            known = kernel.arg_names
            every = signature | types
            builds.append(
                Build(
                    title,
                    kernel,
                    {
                        argument: every[argument]
                        for argument in known
                        if argument in every.keys() - flags.keys()
                    },
                    {argument: value for argument, value in (flags | constants).items() if argument in known},
                    num_warps,
                    num_stages,
                )
            )
    return builds


BUILDS = _builds()
