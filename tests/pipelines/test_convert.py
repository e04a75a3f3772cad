"""From an autoregressive checkpoint to a block-diffusion model: what is kept, what is new, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench.small_checkpoints import CONFIGS, MASK, VOCAB_SIZE, write_small
from tokenizers import AddedToken, Tokenizer

from fewstep.__main__ import main
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import load_model, load_state
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.convert import choose_mask, convert_model, run
from fewstep.pipelines.corpus import Corpus
from fewstep.pipelines.prepare import run as prepare
from fewstep.pipelines.prepare_settings import PrepareConfig
from fewstep.pipelines.pretrain_start import find_start
from fewstep.pipelines.settings import ConvertConfig, PretrainConfig
from fewstep.platform.errors import ConfigError

TARGETS = {"llama": "stable_diffcoder", "qwen2": "fast_dllm_v2", "qwen3": "sdar"}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_kept_but_the_masks_row(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_small(tmp_path / "source", CONFIGS[name], dtype=dtype)
    mask = convert_model(source, tmp_path / "out", 4)
    assert (mask.token_id, mask.found) == (MASK, "known")
    new = ModelConfig.load(tmp_path / "out")
    assert (new.family, new.attention_kind, new.block_size) == (TARGETS[name], "block_causal", 4)
    assert new.logit_shift == (name == "qwen2")
    old, state = load_state(source, ModelConfig.load(source)), load_state(tmp_path / "out", new)
    assert old.keys() == state.keys()
    for key, tensor in state.items():
        assert tensor.dtype == old[key].dtype == dtype
        rows = (
            torch.arange(len(tensor)) != MASK
            if key in ("embed_tokens.weight", "lm_head.weight")
            else slice(None)
        )
        assert torch.equal(tensor[rows], old[key][rows]), key
    row = state["embed_tokens.weight"].float()
    ordinary = row[torch.arange(len(row)) != MASK].norm(dim=1)
    assert ordinary.min() < row[MASK].norm() < ordinary.max()


def bare(special: tuple[str, ...], folder: Path) -> tuple[Tokenizer, ModelConfig]:
    """The small Llama's characters with other special tokens."""
    source = write_small(folder, CONFIGS["llama"])
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    text = json.loads(tokenizer.to_str())
    text["added_tokens"] = [token for token in text["added_tokens"] if token["id"] != MASK]
    text["model"]["vocab"] = {
        ("\u0000" if number == MASK else word): number for word, number in text["model"]["vocab"].items()
    }
    changed = Tokenizer.from_str(json.dumps(text))
    changed.add_special_tokens([AddedToken(word, special=True) for word in special])
    return changed, ModelConfig.load(source)


def test_a_reserved_token_before_an_unused_row_before_a_new_one(tmp_path: Path) -> None:
    tokenizer, config = bare(("<|reserved_special_token_3|>",), tmp_path)
    size = tokenizer.get_vocab_size()
    assert choose_mask(tokenizer, config, "").found == "reserved"
    tokenizer, config = bare((), tmp_path)
    mask = choose_mask(tokenizer, config, "")
    assert (mask.found, mask.token_id) == ("unused row", size - 1)
    full = config.model_copy(update={"vocab_size": size - 1})
    mask = choose_mask(bare((), tmp_path)[0], full, "")
    assert (mask.found, mask.token_id) == ("new row", size - 1)
    assert choose_mask(bare((), tmp_path)[0], config, "a").found == "named"


def test_an_embedding_without_room_gets_a_row(tmp_path: Path) -> None:
    tokenizer, _ = bare((), tmp_path / "source")
    size = tokenizer.get_vocab_size()
    write_small(tmp_path / "source", CONFIGS["llama"] | {"vocab_size": size})
    tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
    mask = convert_model(tmp_path / "source", tmp_path / "out", 8)
    model, changed = load_model(tmp_path / "out")
    assert (mask.token_id, model.config.vocab_size, changed.token_to_id(mask.text)) == (size, size + 1, size)
    assert model.embed_tokens.weight.shape[0] == model.head_weight.shape[0] == size + 1


def test_a_corpus_in_the_sources_tokens_is_one_in_the_models(tmp_path: Path) -> None:
    tokenizer, _ = bare((), tmp_path / "source")
    tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
    convert_model(tmp_path / "source", tmp_path / "out", 4)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x = 1\n" * 30}) + "\n")

    def corpus_of(name: str) -> Corpus:
        prepare(PrepareConfig(sources=(str(tmp_path / "rows.jsonl"),), tokenizer=str(tmp_path / name),
                              sequence_tokens=16, out=tmp_path / f"corpus-{name}", workers=1))  # fmt: skip
        return Corpus(tmp_path / f"corpus-{name}")

    config = PretrainConfig(model=str(tmp_path / "out"), data="x", phases=ConvertConfig(source="x").phases())
    assert find_start(config, corpus_of("source")).model.block_size == 4
    assert find_start(config, corpus_of("out")).model.block_size == 4
    write_small(tmp_path / "other", CONFIGS["llama"])
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        find_start(config, corpus_of("other"))


def test_a_model_that_denoises_already_is_refused(tmp_path: Path) -> None:
    source = write_small(tmp_path / "source", CONFIGS["dream"])
    with pytest.raises(ConfigError, match="fewstep pretrain"):
        convert_model(source, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_modules_that_are_not_there_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    source = write_small(tmp_path / "source", CONFIGS["llama"])
    trainer = {"lora": {"target_modules": ["query_projection"]}}
    config = ConvertConfig(source=str(source), out=tmp_path / "out", data="corpus", trainer=trainer)
    with pytest.raises(ConfigError, match="query_projection"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_the_warm_up_over_block_sizes_ends_at_the_models() -> None:
    phases = ConvertConfig(source="x", block_size=12, block_warmup_share=0.4).phases()
    assert [phase.block_size for phase in phases] == [1, 2, 4, 8, 12]
    assert sum(phase.share for phase in phases) == pytest.approx(1.0)
    assert [phase.block_size for phase in ConvertConfig(source="x", block_size=1).phases()] == [1]


@pytest.mark.ray
def test_a_converted_model_learns_to_denoise_and_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_small(tmp_path / "source", CONFIGS["llama"])
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "x = [1, 2, 3]\n" * (1 + n % 3)}) + "\n" for n in range(40))
    )
    prepare(
        PrepareConfig(
            sources=(str(tmp_path / "rows.jsonl"),), tokenizer=str(source), out=tmp_path / "corpus", sequence_tokens=64,
            workers=1,
        )
    )  # fmt: skip
    config = ConvertConfig.model_validate(
        {"source": str(source), "data": str(tmp_path / "corpus"), "out": tmp_path / "run", "steps": 120, "batch_size": 2,
         "learning_rate": 1e-2, "warmup_steps": 5, "rate_warmup_steps": 10, "trainer": {"precision": "fp32"}}
    )  # fmt: skip
    with ray_session(num_cpus=1):
        run(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["block_size"] == 4
    assert rows[-1]["nll_per_token"] < 0.5 * rows[0]["nll_per_token"]
    model = tmp_path / "run" / "model"
    capsys.readouterr()
    assert main(["generate", f"model={model}", "prompt=x = [1,", "max_tokens=12"]) == 0
    assert capsys.readouterr().out.startswith(" 2, 3]")
    assert ModelConfig.load(model).vocab_size == VOCAB_SIZE
