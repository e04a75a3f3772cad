"""From the store to bench/results/peers-cpu.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.side_by_side.plan import Comparison, Mode, Peer
from bench.side_by_side.settings import Settings
from bench.side_by_side.store import Store

Row = dict[str, Any]


def rows_of(plan: list[Comparison], store: Store, settings: Settings) -> list[Row]:
    """One row for each peer and mode whose tokens compare. Without parity a row has no speed."""
    return [
        _row(peer, comparison.mode, store, settings)
        for comparison in plan
        for peer in comparison.peers
        if peer.role == "tokens"
    ]


def _row(peer: Peer, mode: Mode, store: Store, settings: Settings) -> Row:
    parity = dict(store[f"parity/{peer.name}/{mode.label}"])
    verdict = parity.pop("verdict", False)
    row: Row = {
        "peer": peer.name,
        "mode": mode.cache,
        "policy": policy_label(mode, settings),
        "streams": mode.streams,
        "format": mode.our_format,
        "dtype": settings.dtype,
        "peer_batches": peer.batches,
        "parity": verdict,
        "parity_detail": parity,
        **dict.fromkeys(
            ("tok_s", "our_tok_s", "ratio", "tpf", "forwards", "rows_per_forward", "floor_fraction")
        ),
    }
    key = f"timed/{mode.label}/{peer.name}"
    if verdict is False or key not in store:
        return row | {"reason": parity.get("error", "the tokens differ")}
    timed = store[key]
    if "error" in timed:
        return row | {"reason": timed["error"]}
    return row | _speeds(timed["peer"], timed["ours"], timed["load_average"])


def _speeds(theirs: Row, ours: Row, load_average: float) -> Row:
    return {
        "tok_s": theirs["tok_s"],
        "our_tok_s": ours["tok_s"],
        "ratio": ours["tok_s"] / theirs["tok_s"],
        "tpf": ours["tpf"],
        "peer_tpf": theirs["tpf"],
        "forwards": ours["forwards"],
        "peer_forwards": theirs["forwards"],
        "rows_per_forward": ours["rows_per_forward"],
        "peer_rows_per_forward": theirs["rows_per_forward"],
        "floor_fraction": ours["floor_seconds"] / ours["median_seconds"],
        # CPU seconds leave out what other work took away; on a quiet machine both pairs agree.
        "cpu_ratio": (theirs["median_cpu_seconds"] / theirs["num_tokens"])
        / (ours["median_cpu_seconds"] / ours["num_tokens"]),
        "cpu_floor_fraction": ours["floor_cpu_seconds"] / ours["median_cpu_seconds"],
        "seconds": theirs["seconds"],
        "our_seconds": ours["seconds"],
        "load_average": load_average,
    }


def policy_label(mode: Mode, settings: Settings) -> str:
    """`static_4` or `threshold_0.9`."""
    number = settings.tokens_per_step if mode.kind == "static" else settings.threshold
    return f"{mode.kind}_{number:g}"


def loops_of(plan: list[Comparison], store: Store) -> list[Row]:
    """Forwards per second where tokens do not compare."""
    return [
        {
            "peer": peer.name,
            "streams": mode.streams,
            "forwards_s": timed["peer"]["forwards_s"],
            "our_forwards_s": timed["ours"]["forwards_s"],
            "ratio": timed["ours"]["forwards_s"] / timed["peer"]["forwards_s"],
            "rows_per_forward": timed["ours"]["rows_per_forward"],
            "peer_rows_per_forward": timed["peer"]["rows_per_forward"],
            "load_average": timed["load_average"],
        }
        for peer, mode, timed in _timed(plan, store, "loop")
    ]


def autoregressive_of(plan: list[Comparison], store: Store, embedded_tpf: float | None) -> list[Row]:
    """When denoising breaks even with one token a forward.

    A step of n autoregressive streams makes n tokens and costs `step_ms`; a forward of our n streams costs
    `our_forward_ms` and makes n · TPF. They are level at TPF = our_forward_ms / step_ms.

    Args:
        embedded_tpf: tokens per forward of the embedded model after refinement; None = not known.
    """
    rows = []
    for peer, mode, timed in _timed(plan, store, "autoregressive"):
        step = 1e3 * timed["peer"]["median_seconds"] / timed["peer"]["forwards"]
        forward = 1e3 / timed["ours"]["forwards_s"]
        rows.append(
            {
                "peer": peer.name,
                "streams": mode.streams,
                "tok_s": timed["peer"]["tok_s"],
                "step_ms": step,
                "our_forward_ms": forward,
                "break_even_tpf": forward / step,
                "embedded_tpf": embedded_tpf,
                "ratio_at_embedded_tpf": None if embedded_tpf is None else embedded_tpf * step / forward,
                "load_average": timed["load_average"],
            }
        )
    return rows


def _timed(plan: list[Comparison], store: Store, role: str) -> list[tuple[Peer, Mode, Row]]:
    found = []
    for comparison in plan:
        for peer in comparison.peers:
            key = f"timed/{comparison.mode.label}/{peer.name}"
            if peer.role == role and key in store and "error" not in store[key]:
                found.append((peer, comparison.mode, store[key]))
    return found


def failures_of(plan: list[Comparison], store: Store) -> list[Row]:
    """Peers without comparable tokens that failed; the others say so in their row."""
    found = []
    for comparison in plan:
        for peer in comparison.peers:
            key = f"timed/{comparison.mode.label}/{peer.name}"
            if peer.role != "tokens" and key in store and "error" in store[key]:
                found.append({"peer": peer.name, "reason": store[key]["error"]})
    return found


def embedded_tpf(demo: Path) -> float | None:
    """Tokens per forward of the embedded model after refinement, from the demo's committed report."""
    if not demo.is_file():
        return None
    report: Mapping[str, Any] = json.loads(demo.read_text(encoding="utf-8"))
    after = report.get("after")
    return None if after is None else float(after["tokens_per_forward"])
