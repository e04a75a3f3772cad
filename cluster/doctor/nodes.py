"""Checks of a cluster: every node by itself, and the nodes beside each other. All Ray calls of the doctor are here."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.cluster.doctor.findings import Finding
from fewstep.cluster.doctor.host import host_findings, versions
from fewstep.cluster.doctor.settings import DoctorConfig

_ANSWER_S = 120.0


class HostProbe:
    """The doctor's eyes on one node; an actor there."""

    def findings(self, config: DoctorConfig) -> list[Finding]:
        return host_findings(config)

    def versions(self) -> dict[str, str]:
        return versions()

    def clock(self) -> float:
        return time.time()

    def sees(self, file: Path, content: str) -> bool:
        try:
            return file.read_text() == content
        except OSError:
            return False


def cluster_findings(config: DoctorConfig) -> list[Finding]:
    """Needs an open session."""
    import ray

    from fewstep.actors.collectives import GlooProbe
    from fewstep.actors.placement import free_nodes, on_node

    nodes = free_nodes()
    probe: Any = ray.remote(num_cpus=0)(HostProbe)
    probes = {node.address: probe.options(**on_node(node.node_id, soft=False)).remote() for node in nodes}
    findings: list[Finding] = []
    answers = {name: actor.findings.remote(config) for name, actor in probes.items()}
    for name, answer in answers.items():
        try:
            found = ray.get(answer, timeout=_ANSWER_S)
            findings += [Finding(f.check, f.status, f.found, f.fix, name) for f in found]
        except (ray.exceptions.RayError, TimeoutError) as error:
            # It is compared with nobody: it would not answer that either.
            del probes[name]
            findings.append(_silent(name, error))
    try:
        findings += _compared(ray, probes, config)
    except (ray.exceptions.RayError, TimeoutError) as error:
        findings.append(_silent("a node", error))
    if config.bandwidth and len(nodes) > 1:
        gloo: Any = ray.remote(num_cpus=0)(GlooProbe)
        for node in nodes[1:]:
            pair = [gloo.options(**on_node(place.node_id, soft=False)).remote() for place in (nodes[0], node)]
            findings.append(_bandwidth(ray, pair, nodes[0].address, node.address, config.min_gloo_mb_per_s))
    return findings


def _silent(name: str, error: Exception) -> Finding:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return Finding("node", "wrong", reason, "look at the node's logs", name)


def _compared(ray: Any, probes: Mapping[str, Any], config: DoctorConfig) -> list[Finding]:
    """The nodes beside each other. Raises RayError or TimeoutError when one falls silent meanwhile."""
    if not probes:
        return []
    asked = {name: actor.versions.remote() for name, actor in probes.items()}
    findings = compare_versions({name: ray.get(ref, timeout=_ANSWER_S) for name, ref in asked.items()})
    findings += [_skew(ray, name, actor, config.max_clock_skew_s) for name, actor in probes.items()]
    if config.shared_folder is not None:
        findings += _shared(ray, probes, config.shared_folder)
    return findings


def compare_versions(by_node: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """One finding, or one for each package that nodes disagree on."""
    first = next(iter(by_node.values()))
    findings = []
    for package in first:
        held: dict[str, list[str]] = {}
        for node, found in by_node.items():
            held.setdefault(found[package], []).append(node)
        if len(held) > 1:
            text = ", ".join(f"{version} on {' and '.join(names)}" for version, names in held.items())
            findings.append(
                Finding("versions", "wrong", f"{package}: {text}", "install the same lock file everywhere")
            )
    return findings or [Finding("versions", "ok", f"{len(first)} packages equal on {len(by_node)} nodes")]


def skew_finding(node: str, offset_s: float, error_s: float, limit_s: float) -> Finding:
    """A node's clock against this one's; `error_s` is half the time the question took."""
    found = f"{offset_s:+.3f} s (within {error_s:.3f} s)"
    if abs(offset_s) - error_s > limit_s:
        return Finding(
            "clock", "wrong", f"{found}, {limit_s:g} allowed", "run chrony or ntpd on every node", node
        )
    return Finding("clock", "ok", found, node=node)


def _skew(ray: Any, name: str, actor: Any, limit_s: float) -> Finding:
    asked, there, answered = time.time(), ray.get(actor.clock.remote(), timeout=_ANSWER_S), time.time()
    return skew_finding(name, there - (asked + answered) / 2, (answered - asked) / 2, limit_s)


def _shared(ray: Any, probes: Mapping[str, Any], folder: Path) -> list[Finding]:
    file, content = folder.resolve() / f".fewstep-doctor-{secrets.token_hex(4)}", secrets.token_hex(8)
    try:
        file.write_text(content)
    except OSError as error:
        return [Finding("storage", "wrong", f"{folder}: {error.strerror}", "make the folder, writable")]
    try:
        seen = {
            name: ray.get(actor.sees.remote(file, content), timeout=_ANSWER_S)
            for name, actor in probes.items()
        }
    finally:
        file.unlink(missing_ok=True)
    blind = [name for name, sees in seen.items() if not sees]
    if blind:
        fix = "mount the same storage at the same path on every node"
        return [Finding("storage", "wrong", f"{folder} is another folder on {', '.join(blind)}", fix)]
    return [Finding("storage", "ok", f"{folder} is the same on {len(seen)} nodes")]


def _bandwidth(ray: Any, pair: list[Any], here: str, there: str, least_mb_per_s: float) -> Finding:
    try:
        address, port = ray.get(pair[0].endpoint.remote(there), timeout=_ANSWER_S)
        rates = ray.get(
            [actor.measure.remote(rank, address, port) for rank, actor in enumerate(pair)], timeout=_ANSWER_S
        )
    except (ray.exceptions.RayError, TimeoutError) as error:
        cause = getattr(error, "cause", error)
        return Finding(
            "gloo", "wrong", " ".join(str(cause).split()), "open the ports between the hosts", there
        )
    finally:
        for actor in pair:
            ray.kill(actor)
    return gloo_finding(f"{here} - {there}", min(rates), least_mb_per_s)


def gloo_finding(between: str, bytes_per_s: float, least_mb_per_s: float) -> Finding:
    """The rate of an all-reduce against what is asked for."""
    found = f"{bytes_per_s / 1e6:.0f} MB/s, {between}"
    if bytes_per_s < least_mb_per_s * 1e6:
        return Finding(
            "gloo", "wrong", f"{found}; {least_mb_per_s:g} needed", "look at the link and its interface"
        )
    return Finding("gloo", "ok", found)
