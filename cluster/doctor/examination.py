"""`fewstep doctor`: the examination."""

from __future__ import annotations

import json

from fewstep.cluster.doctor.findings import Finding, as_data
from fewstep.cluster.doctor.host import host_findings, mlflow, ports, redis
from fewstep.cluster.doctor.settings import DoctorConfig
from fewstep.platform.errors import ResourceError


def run(config: DoctorConfig) -> None:
    """Prints what was found.

    Raises:
        ResourceError: something is wrong; after everything has been printed.
    """
    findings = examine(config)
    if config.show == "json":
        print(json.dumps(as_data(findings), indent=2))
    else:
        print("\n".join(finding.line() for finding in findings))
    wrong = [finding.check for finding in findings if finding.status == "wrong"]
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise ResourceError(
            "doctor", f"{len(wrong)} wrong ({names})", "a host with nothing wrong", "see the lines above"
        )


def examine(config: DoctorConfig) -> list[Finding]:
    """Every finding.

    Raises:
        ResourceError: no cluster answers at `config.address`.
    """
    findings = [mlflow(config.tracking_uri)]
    if config.redis:
        findings.append(redis(config.redis))
    if config.address:
        # Late: Ray is needed for a cluster only.
        from fewstep.cluster.doctor.nodes import cluster_findings
        from fewstep.cluster.session import ray_session

        with ray_session(address=config.address):
            return findings + cluster_findings(config)
    findings += [*host_findings(config), *ports(config.ports)]
    if config.bandwidth:
        findings.append(_local_bandwidth(config.min_gloo_mb_per_s))
    return findings


def _local_bandwidth(least_mb_per_s: float) -> Finding:
    from fewstep.actors.collectives import local_gloo_bytes_per_s
    from fewstep.cluster.doctor.nodes import gloo_finding

    try:
        return gloo_finding("two processes of this host", local_gloo_bytes_per_s(), least_mb_per_s)
    except ResourceError as error:
        return Finding("gloo", "wrong", str(error.got), error.fix)
