"""Every fused kernel compiled for real GPUs on a machine without one, with what the compiler spent.

`python bench/compile_kernels.py` prints the table. Triton's own ptxas and cuobjdump do the work; no driver is touched.
Must run in a process without TRITON_INTERPRET=1, which turns kernels into interpreted functions for good.

A kernel is any `@triton.jit` function of a `kernels/*/fused.py` whose name ends in `_kernel`; its module lists the
builds to compile in `BUILDS` (see `launch.Build`).
"""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fewstep.kernels
from fewstep.kernels.launch import Build, interpreted

# Shared memory a block may have, bytes (CUDA programming guide, table of technical specifications per compute capability).
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# A few spilled registers are harmless; more than this turns an inner loop into memory traffic.
MAX_SPILL_BYTES = 64


@dataclass(frozen=True)
class Compiled:
    """What one build became on one architecture.

    Attributes:
        registers: a thread's; spill_bytes: local memory a thread stores to because registers ran out.
        shared_bytes: a block's, static and dynamic; cubin_bytes: size of the binary.
    """

    op: str
    build: str
    arch: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    cubin_bytes: int

    def complaint(self) -> str | None:
        """Why this build must not ship, if there is a reason."""
        allowed = SHARED_BYTES[int(self.arch.removeprefix("sm_"))]
        if self.shared_bytes > allowed:
            return f"{self.shared_bytes} bytes of shared memory; allowed on {self.arch}: {allowed}"
        if self.spill_bytes > MAX_SPILL_BYTES:
            return f"spills {self.spill_bytes} bytes a thread; allowed: {MAX_SPILL_BYTES}"
        return None


def fused_modules() -> dict[str, Any]:
    """Op name to its imported `fused` module, of every op that has one."""
    modules = {}
    for info in pkgutil.iter_modules(fewstep.kernels.__path__):
        name = f"fewstep.kernels.{info.name}"
        if info.ispkg and any(
            m.name == "fused" for m in pkgutil.iter_modules(importlib.import_module(name).__path__)
        ):
            modules[info.name] = importlib.import_module(f"{name}.fused")
    return modules


def kernels_without_a_build(module: Any) -> list[str]:
    """Names of a fused module's kernels that its BUILDS do not cover."""
    covered = {build.kernel.__name__ for build in module.BUILDS}
    named = {
        name
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }
    return sorted(named - covered)


def compile_build(op: str, build: Build, capability: int) -> Compiled:
    """Compile one build for `sm_<capability>`.

    Errors: whatever Triton raises for a kernel that does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if interpreted():
        raise RuntimeError(
            "TRITON_INTERPRET=1 is set: kernels were imported for the interpreter and cannot be compiled"
        )
    types, attributes = {}, {}
    for index, name in enumerate(build.kernel.arg_names):
        if name in build.constexprs:
            types[name] = "constexpr"
            continue
        types[name], _, divisor = build.signature[name].partition(":")
        if divisor:
            attributes[(index,)] = [["tt.divisibility", int(divisor)]]
    unknown = (set(build.signature) | set(build.constexprs)) - set(build.kernel.arg_names)
    if unknown:
        raise ValueError(f"{op} {build.name}: no such argument: {sorted(unknown)}")
    compiled = triton.compile(
        ASTSource(fn=build.kernel, signature=types, constexprs=dict(build.constexprs), attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        op=op,
        build=build.name,
        arch=f"sm_{capability}",
        num_warps=build.num_warps,
        num_stages=build.num_stages,
        registers=usage["REG"],
        # Triton's kernels have no arrays in local memory of their own, so a stack frame is spilled registers.
        spill_bytes=max(usage["STACK"], usage["LOCAL"]),
        shared_bytes=int(compiled.metadata.shared),
        cubin_bytes=len(compiled.asm["cubin"]),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """`cuobjdump --dump-resource-usage`: REG, STACK, SHARED, LOCAL, ... of the only function in a cubin."""
    import triton.knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if len(usage) < 4:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text.strip()}")
    return usage


def compile_all(
    capabilities: tuple[int, ...] = tuple(SHARED_BYTES), num_processes: int = 1
) -> Iterator[Compiled]:
    """Every build of every fused module for each capability, in that order, `num_processes` at a time."""
    modules = fused_modules()
    for op, module in modules.items():
        if missing := kernels_without_a_build(module):
            raise LookupError(f"kernels/{op}/fused.py: no entry in BUILDS for {', '.join(missing)}")
    jobs = [
        (op, index, capability)
        for op, module in modules.items()
        for index in range(len(module.BUILDS))
        for capability in capabilities
    ]
    # Processes, because Triton's compiler holds the interpreter lock; spawned, because a fork would share LLVM's state.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_job, jobs)


def _compile_job(job: tuple[str, int, int]) -> Compiled:
    op, index, capability = job
    module = importlib.import_module(f"fewstep.kernels.{op}.fused")
    return compile_build(op, module.BUILDS[index], capability)
