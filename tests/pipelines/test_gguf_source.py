"""A GGUF file written with llama.cpp's own package becomes the checkpoint it was made of."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from bench.small_checkpoints import CONFIGS, write_small
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fewstep.kernels.model.checkpoint import load_model, load_state
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.convert import run
from fewstep.pipelines.gguf_source import unpacked
from fewstep.pipelines.settings import ConvertConfig
from fewstep.platform.errors import CheckpointError

SPECIAL = ("<|endoftext|>", "<|end|>", "<|mask|>")
# Byte-level BPE: printable ASCII, a space as G with a dot, one merge.
TOKENS = [*SPECIAL, "\u0120", *map(chr, range(33, 127)), "ab"]
LLAMA = CONFIGS["llama"] | {
    "vocab_size": len(TOKENS),
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
}


def write_gguf(path: Path, source: Path) -> None:
    """The small Llama in `source`, as llama.cpp's converter writes one: float32, queries and keys in its order."""
    config, heads, keys = LLAMA, LLAMA["num_attention_heads"], LLAMA["num_key_value_heads"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(
        [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL))
    )  # control tokens, normal ones
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            values = tensor.float()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parts = heads if "q_proj" in name else keys
                values = values.reshape(parts, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(names.get_name(name, (".weight",)), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("llama") / "source", LLAMA, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def file(source: Path) -> Path:
    write_gguf(source.parent / "small.gguf", source)
    return source.parent / "small.gguf"


def test_every_weight_comes_back(source: Path, file: Path, tmp_path: Path) -> None:
    folder = unpacked(file, tmp_path / "unpacked")
    config = ModelConfig.load(folder)
    assert (config.family, config.eos_token_id, config.pad_token_id) == ("llama", 1, 0)
    old, new = load_state(source, ModelConfig.load(source)), load_state(folder, config)
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name]), name
    ids = (
        Tokenizer.from_file(str(folder / "tokenizer.json"))
        .encode("ab c<|end|>", add_special_tokens=False)
        .ids
    )
    assert [TOKENS[number] for number in ids] == ["ab", "\u0120", "c", "<|end|>"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert unpacked(file, folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_convert_takes_the_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(ConvertConfig(source=str(file), out=tmp_path / "run", block_size=8))
    model, _ = load_model(tmp_path / "run" / "model")
    assert (model.config.family, model.config.block_size, model.config.mask_token_id) == (
        "stable_diffcoder",
        8,
        2,
    )
    assert "stable_diffcoder" in capsys.readouterr().out


def test_another_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF nothing of the kind")
    with pytest.raises(CheckpointError, match=r"other\.gguf"):
        unpacked(tmp_path / "other.gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such file"):
        unpacked(tmp_path / "none.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
