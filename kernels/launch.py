"""Which implementation of an op runs, and which builds of its kernels are compiled ahead of time.

An op is a torch `reference.py`, a Triton `fused.py` and a dispatcher that asks `implementation_for`. Triton is an extra:
nothing here imports it, and a dispatcher imports its `fused` module only after `implementation_for` said "fused".
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fewstep.platform.errors import ResourceError

Implementation = Literal["reference", "fused"]

# Contracting a·b + c is off by default from Triton 3.10 on and 3.9 warns until told; every fused module imports this
# one before triton. On: the kernels keep what must not be contracted (maxima, ties) free of products.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for; read by `triton.jit` when a fused module is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def implementation_for(op: str, impl: str | None, tensor: torch.Tensor) -> str:
    """The implementation to run: what was asked for, else fused for CUDA tensors and reference for others.

    Args:
        op: the op's name, for the error.
        impl: the caller's wish; names other than "fused" are the op's own and returned as they are.
        tensor: any input, for its device.
    Errors:
        ResourceError: fused was chosen but Triton is not installed, or the tensor is on a device that no Triton
            backend serves while its interpreter is off.
    """
    if impl is None:
        if not tensor.is_cuda:
            return "reference"
        impl = "fused"
    if impl == "fused":
        if importlib.util.find_spec("triton") is None:
            raise ResourceError(
                f"{op}(impl=...)",
                "fused without triton installed",
                "fused where triton is installed; reference everywhere",
                'install it with pip install "fewstep[triton]" or pass impl="reference"',
            )
        if not (tensor.is_cuda or interpreted()):
            raise ResourceError(
                f"{op}(impl=...)",
                f"fused for a tensor on {tensor.device}",
                "fused for CUDA tensors; on any device under TRITON_INTERPRET=1",
                'pass impl="reference"',
            )
    return impl


@dataclass(frozen=True)
class Build:
    """One specialisation of one kernel, as a launch on real shapes would ask for it.

    `fewstep.kernels.ahead_of_time` compiles every entry of a fused module's `BUILDS` for each architecture.

    Attributes:
        name: unique in its module; says what differs ("head_partial bf16 entropy").
        kernel: the `@triton.jit` function.
        signature: argument name to type, in the kernel's order, `tl.constexpr` arguments left out: `*bf16`, `fp32`,
            `i32`, ... with `:16` behind pointers and integers that are divisible by 16 at run time.
        constexprs: argument name to value.
        num_warps, num_stages: as launched.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
