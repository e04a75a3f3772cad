"""`fewstep inspect`: what it says is what is there, and a folder that does not fit itself is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench.small_checkpoints import CONFIGS, VOCAB_SIZE, random_tensors, write_small
from safetensors.torch import load_file, save_file

from fewstep.__main__ import main
from fewstep.cluster import inspection
from fewstep.cluster.inspection import inspect_model
from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.model.shards import ShardedTensors


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    folder = write_small(tmp_path, CONFIGS[name], dtype=torch.bfloat16)
    tensors = random_tensors(CONFIGS[name], 0, torch.bfloat16)
    report = inspect_model(folder)
    assert report.family == name
    assert report.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.file_bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert report.weight_bytes["bfloat16"] == 2 * report.parameters
    assert report.files == len(list(folder.glob("*.safetensors")))
    model, _ = load_model(folder)
    tied = model.lm_head is None
    assert report.embedding_parameters == model.embed_tokens.weight.numel() * (1 if tied else 2)


def test_active_parameters_leave_out_the_experts_a_token_does_not_meet(tmp_path: Path) -> None:
    config = CONFIGS["llada2"]
    report = inspect_model(write_small(tmp_path, config))
    per_expert = 3 * config["moe_intermediate_size"] * config["hidden_size"]
    idle = config["num_experts"] - config["num_experts_per_tok"]
    assert report.parameters - report.active_parameters == 2 * idle * per_expert  # layers 1 and 2 of 3
    assert report.experts == "2 of 8 routed and 1 shared, layers 1 to 2"


def test_the_command_takes_a_path_and_reads_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardedTensors, "read", None)
    folder = write_small(tmp_path / "model", CONFIGS["sdar"])
    assert main(["inspect", str(folder), "--show", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["block_size"], report["vocab_size"]) == ("sdar", 4, VOCAB_SIZE)
    assert report["special_tokens"]["mask_token_id"] == "2 <|mask|>"
    # 2 (keys and values) · 2 layers · 2 key heads · 16 numbers · 4 bytes.
    assert report["kv_bytes_per_token"]["float32"] == 512
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "block_causal, blocks of 4; a token is predicted at its own row" in text
    assert "generates    yes, in float32 or bfloat16" in text


@pytest.mark.parametrize(
    ("name", "generates"),
    [
        ("llada", "yes, in float32 or bfloat16"),
        ("dream", "yes, in float32 or bfloat16"),
        ("llama", "no: the engine was given an autoregressive model and takes "),
    ],
)
def test_what_will_run_it_is_said(name: str, generates: str, tmp_path: Path) -> None:
    assert inspect_model(write_small(tmp_path, CONFIGS[name])).generates.startswith(generates)


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_small(tmp_path, CONFIGS["llada"])
    parameters = inspect_model(folder).parameters

    class Free:
        available = 3 * parameters

    monkeypatch.setattr(inspection.psutil, "virtual_memory", Free)
    report = inspect_model(folder)
    assert report.generates == "yes, in bfloat16"
    assert report.trains.startswith("not here: one rank needs more than the ")


def test_a_partial_folder_ends_with_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_small(tmp_path, CONFIGS["qwen3"], sharded=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "missing ['model.layers.1.self_attn.k_norm.weight'], surplus []" in error
    assert error.count("\n") == 1


def test_two_paths_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "a", "b"]) == 2
    assert "command line: got a and b; allowed: MODEL" in capsys.readouterr().err
