"""Every fused kernel compiles for sm_80, sm_90 and sm_100 within the registers and the shared memory there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.kernels.ahead_of_time import MAX_SPILL_BYTES, SHARED_BYTES, Compiled

ROOT = Path(__file__).resolve().parents[2]
OPS_WITH_KERNELS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/fused.py"))

pytest.importorskip("triton", reason="triton has no wheel for this system")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """The rows of `bench/compile_kernels.py`, run without the interpreter this process has turned on."""
    out = tmp_path_factory.mktemp("aot") / "kernels-aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")
    command = [sys.executable, str(ROOT / "bench" / "compile_kernels.py"), "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert out.exists(), done.stderr
    return [Compiled(**row) for row in json.loads(out.read_text())["rows"]]


@pytest.mark.timeout(900)
def test_every_kernel_compiles_everywhere_and_fits(
    compiled: list[Compiled], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print()
        for row in compiled:
            print(
                f"{row.op:<12} {row.build:<34} {row.arch:<7} {row.registers:>3} registers "
                f"{row.spill_bytes:>3} B spilled {row.shared_bytes:>6} B shared {row.cubin_bytes:>6} B cubin"
            )
    assert [
        f"{row.op} {row.build} {row.arch}: {row.complaint()}" for row in compiled if row.complaint()
    ] == []
    builds = {(row.op, row.build) for row in compiled}
    assert sorted({op for op, _ in builds}) == OPS_WITH_KERNELS
    assert len(compiled) == len(builds) * len(SHARED_BYTES)
    assert all(row.registers > 0 and row.cubin_bytes > 1000 for row in compiled)


def test_a_build_that_spills_or_does_not_fit_is_refused() -> None:
    fits = Compiled("norm", "forward", "sm_80", 4, 2, 64, MAX_SPILL_BYTES, SHARED_BYTES[80], 20_000)
    assert fits.complaint() is None
    assert "spills" in str(replace(fits, spill_bytes=MAX_SPILL_BYTES + 1).complaint())
    too_big = replace(fits, shared_bytes=SHARED_BYTES[80] + 1)
    assert "shared memory" in str(too_big.complaint())
    assert replace(too_big, arch="sm_90").complaint() is None
