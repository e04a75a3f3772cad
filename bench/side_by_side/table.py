"""The tables of docs/benchmarks.md, from bench/results/peers-cpu.json and from nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.side_by_side.plan import PEERS

from fewstep.platform.errors import ResourceError

MARKS = "peers-cpu"
TITLES = {peer.name: peer.title for peer in PEERS}
GIB = 2**30
# Load of other work above this makes a figure doubtful; ours and the peer's process are one of it at a time.
QUIET_LOAD = 1.3

Row = Mapping[str, Any]


def read_result(path: Path) -> Row:
    """A result of `bench/peers.py`.

    Raises:
        ResourceError: no such file, or not such a result.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResourceError(
            str(path), error, "the result of bench/peers.py", "run bench/peers.py first"
        ) from error
    absent = {
        "rows",
        "loops",
        "autoregressive",
        "not_run",
        "settings",
        "parameters",
        "machine",
        "commit",
    } - result.keys()
    if absent:
        raise ResourceError(
            str(path), f"no {sorted(absent)}", "the result of bench/peers.py", "name another file"
        )
    return result


def section(result: Row) -> str:
    """All tables and what they were made with, as Markdown."""
    parts = [settings_sentence(result), peers_table(result["rows"])]
    if result["loops"]:
        parts += ["Loop shape only, tokens do not compare:", loops_table(result["loops"])]
    if result["autoregressive"]:
        parts += [
            "Against one token a forward, a Qwen3 of the same sizes:",
            autoregressive_table(result["autoregressive"]),
        ]
    if result["not_run"]:
        parts.append(
            "Not run: "
            + "; ".join(f"{TITLES[row['peer']]} ({row['reason']})" for row in result["not_run"])
            + "."
        )
    parts.append(provenance(result))
    return "\n\n".join(parts)


def settings_sentence(result: Row) -> str:
    """Model and settings."""
    settings, counts = result["settings"], result["parameters"]
    sizes = settings["model"]
    million = {name: (count["layers"] / 1e6, count["all"] / 1e6) for name, count in counts.items()}
    return (
        f"Random weights, hidden {sizes['hidden_size']}, {sizes['num_hidden_layers']} layers, inner "
        f"{sizes['intermediate_size']}, vocabulary {sizes['vocab_size']}: LLaDA format {million['llada'][0]:.0f} M parameters "
        f"in the layers, {million['llada'][1]:.0f} M with embedding and head; SDAR and LLaDA2 format (one network) "
        f"{million['sdar'][0]:.0f} M and {million['sdar'][1]:.0f} M. {settings['dtype']}, {settings['threads']} thread a "
        f"process, prompts of {settings['prompt_tokens']} and answers of {settings['max_tokens']} tokens, blocks of "
        f"{settings['block_size']}, temperature 0, end of sequence ignored; medians of {settings['repeats']} rounds."
    )


def peers_table(rows: Sequence[Row]) -> str:
    """Tokens per second, where the tokens compare."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("peer", lambda row: TITLES[row["peer"]]),
        ("cache", lambda row: row["mode"]),
        ("policy", lambda row: row["policy"]),
        (
            "streams",
            lambda row: f"{row['streams']}{'' if row['peer_batches'] or row['streams'] == 1 else ' ¹'}",
        ),
        ("peer tok/s", lambda row: number(row["tok_s"], ".1f")),
        ("our tok/s", lambda row: number(row["our_tok_s"], ".1f")),
        ("ratio", lambda row: number(row["ratio"], ".2f", bold=True)),
        ("TPF", lambda row: number(row["tpf"], ".2f")),
        ("forwards, peer / ours", lambda row: pair(row.get("peer_forwards"), row["forwards"])),
        (
            "rows a forward, peer / ours",
            lambda row: pair(row.get("peer_rows_per_forward"), row["rows_per_forward"]),
        ),
        ("of the floor", lambda row: number(row["floor_fraction"], ".2f")),
        ("parity", parity_cell),
    ]
    return markdown(columns, rows)


def loops_table(rows: Sequence[Row]) -> str:
    """Forwards per second."""
    return markdown(
        [
            ("peer", lambda row: TITLES[row["peer"]]),
            ("streams", lambda row: str(row["streams"])),
            ("peer forwards/s", lambda row: number(row["forwards_s"], ".1f")),
            ("our forwards/s", lambda row: number(row["our_forwards_s"], ".1f")),
            ("ratio", lambda row: number(row["ratio"], ".2f", bold=True)),
            (
                "rows a forward, peer / ours",
                lambda row: pair(row["peer_rows_per_forward"], row["rows_per_forward"]),
            ),
        ],
        rows,
    )


def autoregressive_table(rows: Sequence[Row]) -> str:
    """Break-even tokens per forward."""
    return markdown(
        [
            ("decoder", lambda row: TITLES[row["peer"]]),
            ("streams", lambda row: str(row["streams"])),
            ("tok/s", lambda row: number(row["tok_s"], ".1f")),
            ("step, ms", lambda row: number(row["step_ms"], ".2f")),
            ("our forward, ms", lambda row: number(row["our_forward_ms"], ".2f")),
            ("level at TPF", lambda row: number(row["break_even_tpf"], ".2f", bold=True)),
            ("at the embedded model's TPF", at_embedded),
        ],
        rows,
    )


def at_embedded(row: Row) -> str:
    if row["ratio_at_embedded_tpf"] is None:
        return "-"
    return f"{row['ratio_at_embedded_tpf']:.1f}x at {row['embedded_tpf']:.1f}"


def parity_cell(row: Row) -> str:
    """The verdict, with the share of equal tokens where it is not all."""
    detail, verdict = row["parity_detail"], row["parity"]
    if verdict is False:
        return f"**no**: {row['reason']}"
    equal = detail["fraction_equal"]
    word = "yes" if verdict is True else "approximate"
    if equal == 1.0:
        return word
    ties = f", {detail['num_near_ties']} near-ties" if verdict is True else ""
    return f"{word} ({equal:.0%} equal{ties})"


def provenance(result: Row) -> str:
    """Machine, commit, time and how quiet it was."""
    machine = result["machine"]
    commit, dirty, _ = result["commit"].partition("+dirty")
    loads = [
        row["load_average"]
        for key in ("rows", "loops", "autoregressive")
        for row in result[key]
        if "load_average" in row
    ]
    load = max(loads, default=0.0)
    doubt = "; **other work ran beside it**" if load > QUIET_LOAD else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / GIB:.0f} GiB; load average at most "
        f"{load:.1f}{doubt}; {result['total_seconds'] / 60:.0f} minutes; commit `{commit[:12]}{dirty}`."
    )


def number(value: float | None, pattern: str, bold: bool = False) -> str:
    """A number, or `-` where there is none."""
    if value is None:
        return "-"
    return f"**{value:{pattern}}**" if bold else f"{value:{pattern}}"


def pair(peer: float | None, ours: float | None) -> str:
    """`peer / ours`."""
    return "-" if peer is None or ours is None else f"{peer:.0f} / {ours:.0f}"


def markdown(columns: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row]) -> str:
    """A Markdown table; the first column is text, the others are set to the right."""
    head = "| " + " | ".join(name for name, _ in columns) + " |"
    rule = "|---|" + "---:|" * (len(columns) - 1)
    lines = ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return "\n".join([head, rule, *lines])
