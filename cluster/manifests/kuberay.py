"""KubeRay's objects (API ray.io/v1) as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fewstep.cluster.deploy import ServeConfig, proxy_environment
from fewstep.cluster.manifests.settings import ManifestConfig, WorkerGroup

JOB_FOLDER = "/etc/fewstep"
_ENV = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def ray_cluster(config: ManifestConfig, ray_version: str) -> dict[str, Any]:
    """A cluster that stays."""
    return _object(config, "RayCluster", cluster_spec(config, ray_version))


def ray_job(config: ManifestConfig, ray_version: str) -> dict[str, Any]:
    """A cluster for one job, gone ten minutes after it. The driver runs on the head and joins its own cluster.

    One retry: the job's own checkpoint makes the second try go on where the first one ended.
    """
    spec = {
        "entrypoint": f'fewstep {config.job} {JOB_FOLDER}/job.yaml --ray-address "$RAY_ADDRESS"',
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "backoffLimit": 1,
        "rayClusterSpec": cluster_spec(config, ray_version),
    }
    return _object(config, "RayJob", spec)


def ray_service(config: ManifestConfig, job: ServeConfig, ray_version: str) -> dict[str, Any]:
    """A service. A changed manifest brings up a second cluster and moves the traffic when it is healthy."""
    application = {
        "name": "fewstep",
        "route_prefix": "/",
        "import_path": "fewstep.cluster.serve_app:build",
        "args": job.model_dump(mode="json"),
    }
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [application],
    }
    spec = {
        "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterConfig": cluster_spec(config, ray_version, proxy_environment(job)),
    }
    return _object(config, "RayService", spec)


def job_files(config: ManifestConfig, text: str) -> dict[str, Any]:
    """The job's configuration as a ConfigMap."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{config.name}-job", "namespace": config.namespace},
        "data": {"job.yaml": text},
    }


def cluster_spec(
    config: ManifestConfig, ray_version: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """RayClusterSpec: a head that takes no actors, and the worker groups; `environment` is every pod's, beside the usual."""
    variables = _ENV | dict(environment or {})
    spec: dict[str, Any] = {"rayVersion": ray_version}
    if config.autoscale:
        spec |= {
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 300},
        }
    if config.redis:
        options: dict[str, Any] = {"redisAddress": config.redis}
        if config.redis_secret:
            options["redisPassword"] = _from_secret(config.redis_secret, "password")
        spec["gcsFaultToleranceOptions"] = options
    if config.token_secret:
        spec["authOptions"] = {"mode": "token", "secretName": config.token_secret}
    else:
        spec["authOptions"] = {"mode": "token"}
    head = _pod(config, config.head_cpus, config.head_memory_gib, None, "ray-head", variables)
    spec["headGroupSpec"] = {
        # The driver and Ray's own servers live here; a replica beside them would take them along when memory is short.
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": head,
    }
    spec["workerGroupSpecs"] = [_worker_group(config, group, variables) for group in config.workers]
    return spec


def _worker_group(
    config: ManifestConfig, group: WorkerGroup, environment: Mapping[str, str]
) -> dict[str, Any]:
    most = group.replicas if group.max_replicas is None else group.max_replicas
    return {
        "groupName": group.name,
        "replicas": group.replicas,
        "minReplicas": group.replicas,
        "maxReplicas": most if config.autoscale else group.replicas,
        "rayStartParams": {},
        "template": _pod(config, group.cpus, group.memory_gib, group, "ray-worker", environment),
    }


def _pod(
    config: ManifestConfig,
    cpus: int,
    memory_gib: int,
    group: WorkerGroup | None,
    name: str,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    if group is not None and group.gpus:
        amounts["nvidia.com/gpu"] = str(group.gpus)
    mounts = [{"name": "job", "mountPath": JOB_FOLDER}, {"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "job", "configMap": {"name": f"{config.name}-job"}},
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, memory_gib // 4)}Gi"},
        },
    ]
    if config.claim:
        mounts.append({"name": "shared", "mountPath": str(config.shared_folder)})
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": config.claim}})
    container: dict[str, Any] = {
        "name": name,
        "image": config.image,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        # Equal requests and limits: the node never gives away what a replica was promised.
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {"containers": [container], "volumes": volumes}
    if group is not None:
        pod |= _where(group)
    return {"spec": pod}


def _where(group: WorkerGroup) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if group.gpu_type:
        found["nodeSelector"] = {group.gpu_label: group.gpu_type}
    taints = [*group.tolerations, *(["nvidia.com/gpu"] if group.gpus else [])]
    if taints:
        found["tolerations"] = [_toleration(taint) for taint in dict.fromkeys(taints)]
    return found


def _toleration(taint: str) -> dict[str, str]:
    key, equals, value = taint.partition("=")
    if equals:
        return {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
    return {"key": key, "operator": "Exists", "effect": "NoSchedule"}


def _from_secret(name: str, key: str) -> dict[str, Any]:
    return {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def _object(config: ManifestConfig, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": kind,
        "metadata": {"name": config.name, "namespace": config.namespace},
        "spec": spec,
    }
