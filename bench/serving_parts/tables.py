"""The figures of serving in words, for docs/operations.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def tables(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Every part that was measured: a line each, the peer's rows as a table."""
    texts = [text(parts[name]) for name, text in _TEXTS.items() if name in parts]
    machine = next(iter(parts.values()))["machine"]
    return "\n".join(
        [f"{machine['cpu']}, {machine['cores']} cores, which clients share with the server.", "", *texts]
    )


def _http_ratio(part: Mapping[str, Any]) -> str:
    settings, ratios = part["settings"], part["ratios"]
    fronts = "; ".join(
        f"`front={front}` {found['stream']:.2f} streamed, {found['whole']:.2f} whole"
        for front, found in ratios.items()
    )
    return f"- Through HTTP over in process, {settings['clients']} clients: {fronts} ({_when(part)})."


def _soak(part: Mapping[str, Any]) -> str:
    return (
        f"- {part['clients']} clients for {part['minutes']:g} minutes, some leaving early: {part['requests']:,} requests,"
        f" {part['errors_5xx']} 5xx, {part['not_ended']} without an end, resident memory"
        f" {part['rss_slope_bytes_per_min'] / 1e6:+.2f} MB a minute ({_when(part)})."
    )


def _fuzz(part: Mapping[str, Any]) -> str:
    return (
        f"- {part['requests']:,} requests that nobody should send: {part['errors_5xx']} 5xx,"
        f" {part['leaked_pages']:g} pages left in use ({_when(part)})."
    )


def _recovery(part: Mapping[str, Any]) -> str:
    return (
        f"- One of {part['settings']['replicas']} replicas killed under {part['settings']['clients']} clients:"
        f" {part['in_flight_failed']} of {part['in_flight']} requests in flight failed, the last after"
        f" {part['recovery_s']:.1f} s; {part['later_failed']} of {part['later']} later ones; the replica was back after"
        f" {part['replica_back_s']:.1f} s ({_when(part)})."
    )


def _peer(part: Mapping[str, Any]) -> str:
    model, settings = part["settings"]["model"], part["settings"]
    head = (
        f"- Beside dlmserve on equal weights ({model['num_hidden_layers']} layers of {model['hidden_size']}, {settings['dtype']}),"
        f" {settings['max_tokens']} tokens an answer, {settings['tokens_per_step']} a step; capacity is dlmserve's, in a closed loop:"
        f" {part['capacity_requests_per_s']['dlmserve']:.1f} requests a second, ours"
        f" {part['capacity_requests_per_s']['fewstep']:.1f} ({_when(part)}):"
    )
    rows = [
        f"| {row['of_capacity']:g} | {row['server']} | {row['p50_s']:.2f} | {row['p95_s']:.2f} |"
        f" {row['committed_tokens_per_s']:.0f} | {100 * row['error_share']:.0f} % |"
        for row in part["rows"]
    ]
    title = "| arrivals / capacity | server | p50, s | p95, s | tokens/s | refused |"
    return "\n".join([head, "", title, "|---:|---|---:|---:|---:|---:|", *rows, ""])


def _when(part: Mapping[str, Any]) -> str:
    load = part["load_average_at_end"]["5_min"]
    return f"load {load:.1f}, `{part['commit'].removesuffix('+dirty')[:12]}`"


_TEXTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "http_ratio": _http_ratio,
    "soak": _soak,
    "fuzz": _fuzz,
    "recovery": _recovery,
    "dlmserve": _peer,
}
