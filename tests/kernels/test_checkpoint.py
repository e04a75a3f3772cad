"""Model folders: what is written comes back bit for bit, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from fewstep.kernels.model.checkpoint import embedded_model, load_model, save_model, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.platform.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(embedded_model(), tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__*"))
    )


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_embedded_model_is_small_and_whole() -> None:
    model, tokenizer = load_model(embedded_model())
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert sum(path.stat().st_size for path in embedded_model().iterdir() if path.is_file()) < 12_000_000
    assert tokenizer.get_vocab_size() == model.config.vocab_size


def test_round_trip_keeps_every_bit_and_replaces_an_older_folder(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder)
    target = tmp_path / "copy"
    for _ in range(2):
        save_model(target, model.state_dict(), model.config, tokenizer)
    again, _ = load_model(target)
    assert state_checksum(again.state_dict()) == state_checksum(model.state_dict())
    assert (target / "config.json").read_text() == (folder / "config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "model"]


def test_checksum_sees_one_changed_bit_and_a_renamed_tensor() -> None:
    model, _ = load_model(embedded_model())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = state_checksum(state)
    name = next(iter(state))
    state[name].view(torch.int32).flatten()[7] ^= 1
    assert state_checksum(state) != before
    state[name].view(torch.int32).flatten()[7] ^= 1
    assert state_checksum(state) == before
    state["other"] = state.pop(name)
    assert state_checksum(state) != before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: got no such file"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_truncated_file_is_named(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


def test_missing_and_surplus_tensors_are_named(folder: Path) -> None:
    path = str(folder / "model.safetensors")
    state = load_file(path)
    state["layers.9.extra"] = state.pop("norm.weight")
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"missing \['norm.weight'\], surplus \['layers.9.extra'\]"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    _edit_config(folder, intermediate_size=400)
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight: got \(352, 128\); allowed: shape \(400, 128\)"
    ):
        load_model(folder)


def test_a_tokenizer_of_another_size_is_refused(folder: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="got 1 tokens; allowed: the model's vocab_size"):
        load_tokenizer(folder, ModelConfig.load(folder))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"mask_token_id": 10_000}, "mask_token_id"),
        ({"sliding_window": 5}, "sliding_window"),
        ({"model_type": "gpt2"}, "model_type: got 'gpt2'; allowed: one of .*fewstep_block_diffusion, llada"),
        ({"model_type": "qwen3"}, "architectures: got .*FewstepBlock.*; allowed: one of Qwen3ForCausalLM"),
        ({"family": "llada"}, "family"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(
    folder: Path, changes: dict[str, object], named: str
) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [1, 7, 9, 5_000, 70_001, 300_000])
def test_a_checksum_sees_every_byte_and_its_place(dtype: torch.dtype, size: int) -> None:
    """The last bytes behind whole words, words behind whole runs, and two words that change places."""
    base = (torch.arange(size) % 113 + 1).to(dtype)
    seen = {state_checksum({"w": base})}
    for index in {0, size // 2, size - 1}:
        changed = base.clone()
        changed[index] = -3
        seen.add(state_checksum({"w": changed}))
    variants = [{"w": base.reshape(1, -1)}, {"v": base}, {"w": base.view(torch.uint8)}]
    seen |= {state_checksum(variant) for variant in variants}
    different = len({0, size // 2, size - 1}) + 1 + len(variants) - int(dtype is torch.uint8)
    assert len(seen) == different
    if size > 64:
        swapped = base.clone()
        swapped[:16], swapped[32:48] = base[32:48], base[:16].clone()
        assert state_checksum({"w": swapped}) not in seen
    assert state_checksum({"w": base.clone()}) in seen
