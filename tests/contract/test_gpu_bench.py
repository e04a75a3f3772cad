"""bench/gpu.sh works up to its times, which need a GPU: every case is made, run and compared with its rival."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.cases import Case

ROOT = Path(__file__).resolve().parents[2]


def gpu_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton", reason="triton has no wheel for this system")
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_smoke_run_covers_every_op_and_claims_no_times(tmp_path: Path) -> None:
    done = gpu_sh("--smoke", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["smoke"]
    assert report["complaints"] == []
    assert {row["op"] for row in report["rows"]} == {
        "apply_rope",
        "block_attention",
        "commit",
        "denoise_step",
        "engine",
        "head_confidence",
        "linear_logprob",
        "rms_norm",
        "rope_and_write",
    }
    assert not any("value" in row or "floor" in row for row in report["rows"])
    (engine,) = (row for row in report["rows"] if row["op"] == "engine")
    assert engine["static_forwards"] == engine["forwards"] > 5
    assert engine["equal_tokens"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = gpu_sh()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu: error: torch")
    assert "sees no CUDA device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_part_is_refused_by_name() -> None:
    done = gpu_sh("--smoke", "--only", "kernels,modle")
    assert done.returncode == 2
    assert "modle; allowed: tests, kernels, model, engine" in done.stderr


@pytest.mark.parametrize(
    ("got", "complaint"),
    [
        ((torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3, 4])), None),
        ((torch.tensor([1.0, 2.01]), torch.tensor([1, 2, 3, 5])), None),
        ((torch.tensor([1.0, 2.1]), torch.tensor([1, 2, 3, 4])), "off by"),
        ((torch.tensor([1.0, torch.nan]), torch.tensor([1, 2, 3, 4])), "off by nan"),
        ((torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 0, 0])), "50.00% differ"),
        ((torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3])), "expected"),
        ((torch.tensor([1.0, 2.0]),), "1 outputs"),
    ],
)
def test_wrong_numbers_are_noticed(got: tuple[torch.Tensor, ...], complaint: str | None) -> None:
    case = Case("op", "shape", {}, lambda *_: (), lambda *_: (), 1, 1, tolerance=0.01, mismatches=0.25)
    said = case.complaint(got, (torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3, 4])))
    assert (said is None) if complaint is None else (complaint in str(said))
