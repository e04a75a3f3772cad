"""Every public format: right logits, every byte back, and what does not fit named as the files spell it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.small_checkpoints import (
    CONFIGS,
    MASK,
    VOCAB_SIZE,
    random_tensors,
    tensor_shapes,
    write_small,
    write_weights,
)
from safetensors.torch import load_file, save_file
from tests.kernels.plain_families import plain_logits

from fewstep.kernels.attention import visibility
from fewstep.kernels.model.checkpoint import load_model, load_state, save_model, state_checksum
from fewstep.kernels.model.config import NO_TOKEN, ModelConfig, RopeScaling
from fewstep.kernels.model.families import FAMILIES, family_of
from fewstep.kernels.model.families.names import tensor_names
from fewstep.kernels.model.rotary import rotary_table
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.platform.errors import CheckpointError

TOKENS = [7, 3, 90, MASK, 14, MASK, MASK, 55, 8, 21, MASK, 40, 41]


def logits_of(model: Transformer, tokens: list[int]) -> torch.Tensor:
    config = model.config
    positions = torch.arange(len(tokens))[None]
    visible = visibility(positions, torch.zeros_like(positions), config.sees_block)
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens]), positions, masked_attention(visible)))[0]


def expected_visibility(name: str, size: int) -> torch.Tensor:
    """Written from each model's description, not from its ModelConfig."""
    block = {"sdar": 4, "fast_dllm_v2": 8, "llada2": 8, "stable_diffcoder": 4}.get(name)
    if name in ("llada", "dream"):
        return torch.ones(size, size, dtype=torch.bool)
    index = torch.arange(size) // (block or 1)
    return index[:, None] >= index[None, :]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_family_but_our_own_has_a_small_checkpoint() -> None:
    assert set(CONFIGS) == set(FAMILIES) - {"fewstep"}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_definition(name: str, tmp_path: Path) -> None:
    folder = write_small(tmp_path / name, CONFIGS[name])
    model, _ = load_model(folder)
    tensors = random_tensors(CONFIGS[name], 0, torch.float32)
    expected = plain_logits(CONFIGS[name], tensors, TOKENS, expected_visibility(name, len(TOKENS)))
    found = logits_of(model, TOKENS)
    if model.config.mask_token_id != NO_TOKEN:
        assert torch.isneginf(found[:, MASK]).all()
        found[:, MASK] = expected[:, MASK].float()
    assert expected.std() > 0.5, "logits this flat would hide a wrong map"
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_keeps_every_byte_of_every_file(
    name: str, dtype: torch.dtype, sharded: bool, tmp_path: Path
) -> None:
    folder = write_small(tmp_path / "source", CONFIGS[name], dtype=dtype, sharded=sharded)
    (folder / "modeling_of_theirs.py").write_text("# kept, never run\n")
    model, tokenizer = load_model(folder)
    assert next(model.parameters()).dtype == dtype
    save_model(tmp_path / "copy", model.state_dict(), model.config, tokenizer, source=folder)
    assert files_of(tmp_path / "copy") == files_of(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_written_without_their_source_load_the_same(name: str, tmp_path: Path) -> None:
    folder = write_small(tmp_path / "source", CONFIGS[name], dtype=torch.bfloat16)
    model, tokenizer = load_model(folder)
    save_model(tmp_path / "copy", model.state_dict(), model.config, tokenizer)
    again, _ = load_model(tmp_path / "copy")
    assert state_checksum(again.state_dict()) == state_checksum(model.state_dict())
    assert again.config == model.config
    stored = load_file(tmp_path / "copy" / "model.safetensors")
    assert {n: t.dtype for n, t in stored.items()} == {
        n: t.dtype for n, t in random_tensors(CONFIGS[name], 0, torch.bfloat16).items()
    }


@pytest.mark.parametrize("name", [*CONFIGS, "fewstep"])
def test_names_without_torch_are_the_modules_own(name: str, tmp_path: Path) -> None:
    if name == "fewstep":
        config = ModelConfig(
            vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, intermediate_size=16, max_position_embeddings=32, block_size=4, mask_token_id=2,
            eos_token_id=1, pad_token_id=0, qkv_bias=True, output_bias=True, mlp_bias=True,
        )  # fmt: skip
    else:
        config = ModelConfig.load(write_small(tmp_path, CONFIGS[name]))
    names = list(tensor_names(config))
    assert sorted(names) == sorted(Transformer(config).state_dict())
    assert sorted({piece.target for piece in family_of(config).pieces(config)}) == sorted(names)


def test_a_load_type_converts_all_but_the_routers_bias(tmp_path: Path) -> None:
    folder = write_small(tmp_path, CONFIGS["llada2"], dtype=torch.bfloat16)
    model, _ = load_model(folder, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model, _ = load_model(folder, torch.bfloat16)
    assert {n for n, t in model.state_dict().items() if t.dtype == torch.float32} == {
        "layers.1.mlp.router.bias",
        "layers.2.mlp.router.bias",
    }


@pytest.mark.parametrize("name", ["qwen3", "sdar", "fast_dllm_v2"])
def test_a_tied_head_that_is_stored_twice_is_read_and_written_back(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name] | {"tie_word_embeddings": True}
    folder = write_small(tmp_path / "source", config, sharded=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = load_model(folder)
    assert model.head_weight is model.embed_tokens.weight
    save_model(tmp_path / "copy", model.state_dict(), model.config, tokenizer, source=folder)
    assert files_of(tmp_path / "copy") == files_of(folder)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="tie_word_embeddings: got a stored head that is not the embedding"
    ):
        load_model(folder)


def test_missing_and_surplus_tensors_carry_the_names_of_the_file(tmp_path: Path) -> None:
    folder = write_small(tmp_path, CONFIGS["llada2"], sharded=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.zeros(24, 48)
    save_file(tensors, folder / "model.safetensors")
    expected = (
        r"missing \['model.layers.1.mlp.experts.5.up_proj.weight'\], "
        r"surplus \['model.layers.1.mlp.experts.8.up_proj.weight'\]"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "expected"),
    [
        ("llada2", "model.layers.0.attention.query_key_value.weight", (64, 48), (128, 48)),
        ("llada2", "model.layers.1.mlp.experts.3.down_proj.weight", (48, 25), (48, 24)),
        ("llada", "model.transformer.blocks.1.ff_out.weight", (64, 81), (64, 80)),
        ("sdar", "model.layers.0.self_attn.q_norm.weight", (48,), (16,)),
    ],
)
def test_a_wrong_shape_is_named_before_anything_is_read(
    name: str, tensor: str, shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = random_tensors(CONFIGS[name], 0, torch.float32)
    folder = write_small(tmp_path, CONFIGS[name])
    write_weights(folder, tensors | {tensor: torch.zeros(shape)}, sharded=True)
    with pytest.raises(CheckpointError) as caught:
        load_state(folder, ModelConfig.load(folder))
    assert str(caught.value.field).endswith(
        f"of-{len(list(folder.glob('*.safetensors'))):05d}.safetensors:{tensor}"
    )
    assert (caught.value.got, caught.value.allowed) == (shape, f"shape {expected}")


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    folder = write_small(tmp_path, CONFIGS["sdar"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.safetensors: got unreadable"):
        load_model(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003.safetensors: got no such file"):
        load_model(folder)
    shard.write_bytes(whole)
    moved = dict(index["weight_map"])
    moved["model.norm.weight"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(
        CheckpointError, match=r"model.norm.weight: got model-00001.* by the index, model-00003"
    ):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="an index with a weight_map"):
        load_model(folder)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    write_small(tmp_path / "other", CONFIGS["sdar"], sharded=False)
    folder = write_small(tmp_path / "model", CONFIGS["sdar"])
    names = random_tensors(CONFIGS["sdar"], 0, torch.float32)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "../other/model.safetensors")})
    )
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(folder)


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_small(tmp_path, CONFIGS["sdar"], sharded=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no such file, but pytorch_model.bin.*pickles are not read"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("llada", {"block_type": "sequential"}, "block_type: got 'sequential'"),
        ("llada", {"scale_logits": True}, "scale_logits: got True"),
        ("llada", {"n_heads": None}, "n_heads: got nothing"),
        ("sdar", {"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ("sdar", {"mask_token_id": None}, "mask_token_id: got nothing"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window: got True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: got dynamic"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}},
            r"yarn with \['mscale'\]",
        ),
        ("llada2", {"score_function": "softmax"}, "score_function: got 'softmax'"),
        ("llada2", {"topk_group": 5}, "topk_group must be at most n_group"),
        ("dream", {"mask_token_id": 9_999}, "mask_token_id must be below vocab_size"),
        ("dream", {"torch_dtype": "int8"}, "torch_dtype"),
        ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "architectures"),
    ],
)
def test_a_field_that_cannot_be_followed_is_refused_by_name(
    name: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = write_small(tmp_path, CONFIGS[name])
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.load(folder)


def test_transformers_5_spelling_reads_the_same(tmp_path: Path) -> None:
    """`dtype` for `torch_dtype`, and the rotary fields gathered in `rope_parameters`."""
    old = ModelConfig.load(write_small(tmp_path / "old", CONFIGS["llama"]))
    content = json.loads((tmp_path / "old" / "config.json").read_text())
    content["rope_parameters"] = {"rope_theta": content.pop("rope_theta"), **content.pop("rope_scaling")}
    content["dtype"] = content.pop("torch_dtype")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps(content))
    new = ModelConfig.load(tmp_path / "new")
    assert new.rope_scaling is not None
    assert new.model_dump(exclude={"source"}) == old.model_dump(exclude={"source"})


def test_rope_scaling_stretches_slow_dimensions_and_keeps_fast_ones() -> None:
    base = {
        "vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 64, "intermediate_size": 16, "max_position_embeddings": 4096, "block_size": 4, "mask_token_id": 2,
        "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip

    def angles(scaling: RopeScaling | None) -> torch.Tensor:
        cos, sin = rotary_table(ModelConfig.model_validate(base | {"rope_scaling": scaling}))
        return torch.atan2(sin[1].double(), cos[1].double())  # radians of one position

    plain = angles(None)
    torch.testing.assert_close(
        angles(RopeScaling(kind="linear", factor=4.0)), plain / 4, rtol=1e-6, atol=1e-9
    )
    for kind in ("llama3", "yarn"):
        scaled = angles(RopeScaling(kind=kind, factor=4.0, original_max_position_embeddings=1024))
        ratio = plain / scaled
        torch.testing.assert_close(ratio[:4], torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)
        torch.testing.assert_close(ratio[-4:], torch.full((4,), 4.0, dtype=torch.float64), rtol=1e-5, atol=0)
        assert (ratio.diff() > -1e-6).all()
    cos, sin = rotary_table(
        ModelConfig.model_validate(
            base | {"rope_scaling": {"kind": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}}
        )
    )
    expected = torch.full_like(cos, 0.1 * torch.log(torch.tensor(8.0)).item() + 1.0)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), expected)


def test_our_own_format_holds_every_switch(tmp_path: Path) -> None:
    """A model of another family's architecture, saved as ours: fields that differ from ours are written, others not."""
    source = ModelConfig.load(write_small(tmp_path / "llada2", CONFIGS["llada2"]))
    model, tokenizer = load_model(tmp_path / "llada2")
    ours = ModelConfig.model_validate(
        source.model_dump(exclude={"model_type", "architectures"})
        | {"vocab_size": tokenizer.get_vocab_size()}
    )
    state = dict(model.state_dict())
    for name in ("embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][: ours.vocab_size]
    save_model(tmp_path / "ours", state, ours, tokenizer)
    again, _ = load_model(tmp_path / "ours")
    assert again.config == ours
    assert ours.family == "fewstep"
    assert "qk_norm" not in json.loads(ours.dump())
    torch.testing.assert_close(
        logits_of(again, TOKENS), logits_of(model, TOKENS)[:, : ours.vocab_size], rtol=0, atol=0
    )


def test_a_padded_vocabulary_is_fine_and_a_larger_tokenizer_is_not(tmp_path: Path) -> None:
    folder = write_small(tmp_path, CONFIGS["dream"])
    _, tokenizer = load_model(folder)
    assert tokenizer.get_vocab_size() < VOCAB_SIZE
    tokenizer.add_tokens([f"extra {index}" for index in range(VOCAB_SIZE)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=f"allowed: at most the model's vocab_size {VOCAB_SIZE}"):
        load_model(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_never_holds_a_second_copy(dtype: str, tmp_path: Path) -> None:
    config = CONFIGS["sdar"] | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10}
    folder = write_small(tmp_path, config | {"num_hidden_layers": 0}, sharded=False)
    content = json.loads((folder / "config.json").read_text()) | config | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content))
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in tensor_shapes(config).items()}
    write_weights(folder, zeros, sharded=False)
    script = Path(__file__).resolve().parents[2] / "bench" / "load_memory.py"
    done = subprocess.run([sys.executable, script, folder, dtype], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["weights_bytes"] > 240 * 2**20
    # 64 MiB of the file and what the allocator rounds up; a second copy would be at least 240 MiB.
    assert measured["peak_bytes"] < measured["weights_bytes"] + 80 * 2**20
    for rank in range(2):
        words = [sys.executable, script, folder, dtype, str(rank), "2"]
        part = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        assert part["weights_bytes"] < 0.6 * measured["weights_bytes"]
        assert part["peak_bytes"] < part["weights_bytes"] + 80 * 2**20
