"""Which implementation runs, and how one that cannot run is refused."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fewstep.kernels.ahead_of_time import fused_modules, kernels_without_a_build
from fewstep.kernels.launch import implementation_for
from fewstep.kernels.norm import rms_norm
from fewstep.platform.errors import ResourceError


def test_the_cpu_gets_the_reference_and_a_wish_is_granted() -> None:
    x = torch.zeros(2)
    assert implementation_for("op", None, x) == "reference"
    assert implementation_for("op", "chunked", x) == "chunked"


def test_fused_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ResourceError, match=r"rms_norm.*without triton.*fewstep\[triton\]"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6, impl="fused")


def test_fused_on_the_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ResourceError, match=r"tensor on cpu.*TRITON_INTERPRET"):
        implementation_for("op", "fused", torch.zeros(1))


def test_a_kernel_without_a_build_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this system")
    norm = fused_modules()["norm"]
    assert kernels_without_a_build(norm) == []
    monkeypatch.setattr(norm, "BUILDS", [b for b in norm.BUILDS if "backward" not in b.name])
    assert kernels_without_a_build(norm) == ["rms_norm_backward_kernel"]
