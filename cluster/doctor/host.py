"""Checks of one host. Each looks at the real thing and says what it found; none raises."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from pathlib import Path

from fewstep.cluster.doctor.findings import Finding
from fewstep.cluster.doctor.settings import DoctorConfig
from fewstep.platform.errors import FewstepError, ResourceError

PACKAGES = ("fewstep", "torch", "ray", "deepspeed", "mlflow", "numpy", "pyarrow", "tokenizers")
_OLDEST_PYTHON = (3, 11)
_SHARED_MEMORY = Path("/dev/shm")


def host_findings(config: DoctorConfig) -> list[Finding]:
    """Everything that is true of a host whether or not it has joined a cluster."""
    return [
        python(),
        torch_build(),
        accelerator(),
        triton(),
        deepspeed(config.build),
        room(
            "shared memory",
            _SHARED_MEMORY,
            config.min_shared_memory_gb,
            "give the container a larger --shm-size",
        ),
        room("disk", Path.cwd(), config.min_disk_gb, "free some space"),
        sandbox(),
    ]


def versions() -> dict[str, str]:
    """Of Python and of every package that two nodes must agree on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < _OLDEST_PYTHON:
        return Finding("python", "wrong", found, "install Python 3.11 or newer")
    return Finding("python", "ok", f"{found} ({sys.executable})")


def torch_build() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", "wrong", str(error).splitlines()[0], "install the locked requirements")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("torch", "ok", f"{torch.__version__}, {built}")


def accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        return Finding("cuda", "ok", f"{len(names)} x {names[0]}, NCCL {nccl}")
    if Path("/dev/nvidia0").exists():
        return Finding(
            "cuda",
            "wrong",
            "a GPU that torch cannot use",
            "install torch's CUDA build and a driver it supports",
        )
    return Finding("cuda", "note", "no GPU: everything runs on the CPU")


def triton() -> Finding:
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "triton", "note", "missing: fused kernels are refused", "pip install 'fewstep[triton]'"
        )
    return Finding("triton", "ok", found)


def deepspeed(build: bool) -> Finding:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler.split()[0]) is None:
        return Finding("deepspeed", "wrong", f"no C++ compiler ({compiler})", "install g++")
    if not build:
        return Finding("deepspeed", "ok", f"a compiler is there ({compiler}); build=true compiles")
    from fewstep.actors.collectives import build_deepspeed_ops

    try:
        return Finding("deepspeed", "ok", f"operator built and loaded in {build_deepspeed_ops():.1f} s")
    except ResourceError as error:
        return Finding("deepspeed", "wrong", str(error.got), error.fix)


def room(check: str, folder: Path, need_gb: float, fix: str) -> Finding:
    try:
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return Finding(check, "wrong", f"{folder}: {error.strerror}", fix)
    found = f"{free:.1f} GB free"
    return (
        Finding(check, "ok", found)
        if free >= need_gb
        else Finding(check, "wrong", f"{found}, {need_gb:g} needed", fix)
    )


def sandbox() -> Finding:
    """Which walls stand between model-written code and this host."""
    from fewstep.actors.sandbox.sandbox import Sandbox

    try:
        box = Sandbox()
    except FewstepError as error:
        return Finding(
            "sandbox", "wrong", " ".join(str(error).split()), "allow user namespaces, or run as root"
        )
    layers = box.isolation
    box.close()
    missing = sorted({"pidns", "mountns", "netns", "seccomp"} - set(layers.split("+")))
    if missing:
        return Finding("sandbox", "note", f"{layers}; without {', '.join(missing)}", "allow user namespaces")
    return Finding("sandbox", "ok", layers)


def ports(numbers: tuple[int, ...]) -> list[Finding]:
    """Whether they could be listened on."""
    from fewstep.platform.ports import free_port

    findings = []
    for number in numbers:
        try:
            free_port("127.0.0.1", number)
            findings.append(Finding("port", "ok", f"{number} is free"))
        except ResourceError as error:
            findings.append(Finding("port", "note", f"{number}: {error.got}", error.fix))
    return findings


def mlflow(uri: str) -> Finding:
    """Whether the store answers."""
    from fewstep.platform.mlflow_store import open_client, project_uri, shown_uri

    chosen = project_uri(uri)
    try:
        open_client(chosen, create=False)
    except FewstepError as error:
        got, fix = str(getattr(error, "got", error)), str(getattr(error, "fix", ""))
        # The project's own store is made by the first job; one that was named must be there.
        return Finding("mlflow", "wrong" if uri else "note", f"{shown_uri(chosen)}: no answer ({got})", fix)
    return Finding("mlflow", "ok", shown_uri(chosen))


def redis(address: str) -> Finding:
    """Whether a Redis answers there."""
    host, _, port = address.rpartition(":")
    fix = "start it, or correct `redis`; without it a head that restarts forgets the cluster"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3.0) as connection:
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
    except (OSError, ValueError, OverflowError) as error:
        return Finding("redis", "wrong", f"{address}: {error}", fix)
    # A server that wants a password answers, and Ray brings one.
    if answer.startswith((b"+PONG", b"-NOAUTH")):
        return Finding("redis", "ok", f"{address} answers")
    return Finding("redis", "wrong", f"{address}: no Redis ({answer[:20]!r})", fix)
