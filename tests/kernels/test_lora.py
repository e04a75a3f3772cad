"""Low-rank adapters against formulas over the files' own tensors, and against PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from bench.small_checkpoints import CONFIGS, random_tensors, write_small
from safetensors.torch import load_file, save_file
from tests.kernels.plain_families import plain_logits
from tests.kernels.test_families import TOKENS, expected_visibility, logits_of

from fewstep.kernels.attention import visibility
from fewstep.kernels.model.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_adapter,
    is_adapter,
    load_adapter,
    read_header,
    save_adapter,
)
from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.lora import DOWN, UP, Lora, dropped, merge_into
from fewstep.kernels.model.lora_settings import LoraSettings, chosen_modules, peft_targets
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.kernels.rows import RowBatch, SampleRows
from fewstep.platform.errors import CheckpointError, ConfigError

SETTINGS = LoraSettings(rank=4, alpha=8)


def adapted(folder: Path, settings: LoraSettings = SETTINGS) -> tuple[Transformer, Lora]:
    """A model with an adapter that changes what it says."""
    model, _ = load_model(folder)
    lora = Lora(model.config, settings)
    lora.attach(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, lora.eval()


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Without the mask token's -inf."""
    return logits[torch.isfinite(logits)]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_is_what_its_formula_adds_to_the_tensors_of_the_files(name: str, tmp_path: Path) -> None:
    folder = write_small(tmp_path / name, CONFIGS[name])
    model, lora = adapted(folder)
    tensors = {key: value.double() for key, value in random_tensors(CONFIGS[name], 0, torch.float32).items()}
    factors = lora.factors()
    for key in [key for key in factors if key.endswith(DOWN)]:
        module = key.removesuffix(DOWN)
        tensors[f"{module}.weight"] += 2.0 * factors[module + UP].double() @ factors[key].double()
    expected = plain_logits(CONFIGS[name], tensors, TOKENS, expected_visibility(name, len(TOKENS)))
    found = logits_of(model, TOKENS)
    torch.testing.assert_close(finite(found).double(), expected[torch.isfinite(found)], rtol=1e-4, atol=1e-4)

    plain, _ = load_model(folder)
    before = logits_of(plain, TOKENS)
    assert (finite(before) - finite(found)).abs().max() > 1.0, "an adapter this weak would hide a wrong map"
    with lora.detached():
        assert torch.equal(logits_of(model, TOKENS), before)
    assert torch.equal(logits_of(model, TOKENS), found)
    plain.load_state_dict(lora.merged(model.state_dict(), factors))
    torch.testing.assert_close(finite(logits_of(plain, TOKENS)), finite(found), rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_changes_nothing_and_learns_alone(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "llada2", CONFIGS["llada2"])
    model, _ = load_model(folder)
    before = logits_of(model, TOKENS)
    lora = Lora(model.config, SETTINGS)
    lora.attach(model)
    assert torch.equal(logits_of(model, TOKENS), before)
    other, same = Lora(model.config, SETTINGS.model_copy(update={"seed": 1})), Lora(model.config, SETTINGS)
    first = next(iter(lora.factors()))
    assert torch.equal(lora.factors()[first], same.factors()[first])
    assert not torch.equal(lora.factors()[first], other.factors()[first])
    bound = lora.factors()[first].shape[1] ** -0.5
    assert 0.8 * bound < lora.factors()[first].abs().max() <= bound

    positions = torch.arange(len(TOKENS))[None]
    visible = visibility(positions, torch.zeros_like(positions), model.config.sees_block)
    model(torch.tensor([TOKENS]), positions, masked_attention(visible)).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    # No token may go to an expert, and behind a B of zeros no A has a gradient yet.
    assert sum(bool(up.grad is not None and up.grad.any()) for up in lora.up.values()) > 40


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_a_function_of_its_key(checkpointing: bool, tmp_path: Path) -> None:
    """So that a layer that runs again in the backward pass has the gradient of the forward that was."""
    folder = write_small(tmp_path / "sdar", CONFIGS["sdar"])
    model, lora = adapted(folder, SETTINGS.model_copy(update={"dropout": 0.3}))
    without = logits_of(model, TOKENS)
    lora.train()
    lora.draw(5)
    first = logits_of(model, TOKENS)
    lora.draw(6)
    assert not torch.equal(logits_of(model, TOKENS), first)
    lora.draw(5)
    assert torch.equal(logits_of(model, TOKENS), first)
    assert not torch.equal(without, first)

    model.gradient_checkpointing = checkpointing
    positions = torch.arange(len(TOKENS))[None]
    visible = visibility(positions, torch.zeros_like(positions), model.config.sees_block)

    def loss() -> torch.Tensor:
        hidden = model(torch.tensor([TOKENS]), positions, masked_attention(visible))
        return hidden.square().sum()

    weight = next(iter(lora.up.values()))
    (gradient,) = torch.autograd.grad(loss(), weight)
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    with torch.no_grad():
        weight += step
        above = float(loss())
        weight -= 2 * step
        below = float(loss())
    assert (above - below) / 2 == pytest.approx(float((gradient * step).sum()), rel=2e-2)


def test_dropout_leaves_out_the_share_asked_for_and_keeps_the_mean() -> None:
    x = torch.ones(400, 500)
    out = dropped(x, 0.3, torch.tensor(11), 0)
    assert float((out == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01)
    other = dropped(x, 0.3, torch.tensor(11), 1)
    assert float(((out == 0) & (other == 0)).float().mean()) == pytest.approx(0.09, abs=0.005)
    # Neither rows nor columns share a mask.
    assert len(torch.unique(out, dim=0)) == 400
    assert len(torch.unique(out, dim=1)[0]) == 500


def test_compiled_it_learns_the_same() -> None:
    """Under frozen weights the first layer's queries and keys need no gradient, which rotates them another way."""
    config = ModelConfig.load(embedded_model()).model_copy(update={"num_hidden_layers": 1})
    settings = LoraSettings(rank=2, target_modules=("down_proj",), dropout=0.2)
    tokens = np.random.Generator(np.random.Philox(1)).integers(4, 60, (3, 24))
    samples = [SampleRows.clean(row) for row in tokens]
    for sample, row in zip(samples, tokens, strict=True):
        sample.add_state(
            np.full(16, config.mask_token_id), np.arange(8, 24), row[8:], np.ones(16, np.float32)
        )
    rows = RowTensors.of(RowBatch.collate(samples))
    found = []
    for compiled in (False, True):
        transformer = Transformer(config)
        transformer.initialise(3)
        lora = Lora(config, settings)
        lora.attach(transformer)
        lora.draw(4)
        model = TrainingModel(transformer, compiled=compiled, adapter=lora)
        logprob, _ = model(
            rows.tokens, rows.positions, rows.copies, rows.target_rows, rows.targets, config.block_size
        )
        logprob.sum().backward()
        found.append((logprob.detach(), [up.grad for up in lora.up.values()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_merge_is_rounded_once(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "dream", CONFIGS["dream"], dtype=torch.bfloat16)
    model, lora = adapted(folder)
    name, factors = "layers.1.mlp.up_proj.weight", lora.factors()
    before = model.state_dict()[name].clone()
    merge_into(model.state_dict(), factors, model.config, 2.0)
    delta = 2.0 * factors[f"model.layers.1.mlp.up_proj{UP}"] @ factors[f"model.layers.1.mlp.up_proj{DOWN}"]
    assert torch.equal(model.state_dict()[name], (before.float() + delta).bfloat16())


PEFT_TARGETS = [("all-linear",), ("q_proj", "down_proj"), ("layers.1.self_attn.v_proj", "o_proj")]


@pytest.mark.parametrize("targets", PEFT_TARGETS, ids=lambda targets: "+".join(targets))
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_peft_computes_the_same_with_our_adapter(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_small(tmp_path / name, CONFIGS[name])
    settings = LoraSettings(rank=3, alpha=5, target_modules=targets)
    model, lora = adapted(folder, settings)
    save_adapter(tmp_path / "adapter", lora.factors(), settings, model.config, str(folder), "0" * 64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing or surplus keys
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    changed = {key for key, _ in wrapped.named_parameters() if "lora_A" in key}
    assert len(changed) == len(chosen_modules(model.config, targets))
    with torch.no_grad():
        logits = wrapped(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits, logits_of(model, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_we_compute_the_same_with_pefts_adapter(name: str, rslora: bool, tmp_path: Path) -> None:
    folder = write_small(tmp_path / name, CONFIGS[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(theirs, options).eval()
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(
                    0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
                )
        expected = wrapped(torch.tensor([TOKENS])).logits[0]
    wrapped.save_pretrained(tmp_path / "adapter")
    model, _ = load_model(folder)
    merge_into(model.state_dict(), *_with_config(tmp_path / "adapter", model.config))
    torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=1e-4, atol=1e-4)


def _with_config(folder: Path, config: ModelConfig) -> tuple[dict[str, torch.Tensor], ModelConfig, float]:
    factors, scale = load_adapter(folder, config)
    return factors, config, scale


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "llada2", CONFIGS["llada2"])
    model, lora = adapted(folder)
    save_adapter(tmp_path / "adapter", lora.factors(), SETTINGS, model.config, "models:/base/3", "ab" * 32)
    factors, scale = load_adapter(tmp_path / "adapter", model.config)
    assert scale == 2.0
    assert factors.keys() == lora.factors().keys()
    assert all(torch.equal(factors[name], tensor) for name, tensor in lora.factors().items())
    header = read_header(tmp_path / "adapter")
    assert (header.rank, header.alpha, header.base, header.base_digest) == (4, 8, "models:/base/3", "ab" * 32)
    assert "model.layers.2.mlp.experts.7.down_proj" in header.modules
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(folder)


def test_peft_finds_by_our_target_modules_what_was_trained_and_nothing_else(tmp_path: Path) -> None:
    """LLaDA calls both the MLP's last projection and the head `ff_out`."""
    config = ModelConfig.load(write_small(tmp_path / "llada", CONFIGS["llada"]))
    blocks = [f"model.transformer.blocks.{layer}.ff_out" for layer in range(2)]
    assert peft_targets(config, chosen_modules(config, ["ff_out", "q_proj"])) == [*blocks, "q_proj"]
    chosen = chosen_modules(config, ["all-linear"])
    assert len(chosen) == 14
    assert "model.transformer.ff_out" not in chosen


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("llada", "attn_out, ff_out, ff_proj, k_proj, q_proj, up_proj, v_proj"),
        ("llada2", "dense, down_proj, gate_proj, query_key_value, up_proj"),
        ("sdar", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ],
)
@pytest.mark.parametrize("target", ["c_attn", "lm_head", "proj", "embed_tokens"])
def test_a_target_that_a_family_does_not_have_is_refused(
    name: str, allowed: str, target: str, tmp_path: Path
) -> None:
    config = ModelConfig.load(write_small(tmp_path / name, CONFIGS[name]))
    with pytest.raises(ConfigError) as refused:
        Lora(config, LoraSettings(target_modules=("all-linear", target)))
    assert str(refused.value).startswith(
        f"trainer.lora.target_modules: got '{target}'; allowed: all-linear, or of"
    )
    assert allowed in str(refused.value)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
_AT = "base_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(use_dora=True), "use_dora: got True; allowed: nothing: it is not supported"),
        (lambda c, t: c.update(bias="all"), "bias: got 'all'; allowed: none"),
        (lambda c, t: c.update(modules_to_save=["lm_head"]), r"modules_to_save: got \['lm_head'\]"),
        (lambda c, t: c.update(rank_pattern={"q_proj": 2}), r"rank_pattern: got \{'q_proj': 2\}"),
        (lambda c, t: c.update(alpha_pattern={"q_proj": 2}), "alpha_pattern: got"),
        (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights: got 'pissa'"),
        (lambda c, t: c.update(some_new_option=3), "some_new_option: got 3"),
        (lambda c, t: c.update(peft_type="LOHA"), "peft_type: got 'LOHA'; allowed: LORA"),
        (lambda c, t: c.update(r=0), "r: got 0; allowed: a rank of at least 1"),
        (lambda c, t: c.pop("lora_alpha"), "lora_alpha: got None"),
        (lambda c, t: c.update(r=8), r"lora_A.weight: got shape \(4, 352\); allowed: rank 8"),
        (lambda c, t: t.update({f"{_AT}.lora_A.weight": torch.zeros(4, 64)}),
         r"q_proj.lora_A.weight: got shape \(4, 64\); allowed: \(4, 128\) for this base model"),
        (lambda c, t: t.update({"base_model.model.h.0.c_attn.lora_A.weight": torch.zeros(4, 64)}),
         "c_attn.lora_A.weight: got no module h.0.c_attn in the fewstep model"),
        (lambda c, t: t.pop(f"{_AT}.lora_B.weight"), "q_proj.lora_A.weight: got one half"),
        (lambda c, t: t.update({f"{_AT}.lora_magnitude_vector": torch.zeros(4)}),
         "lora_magnitude_vector: got a tensor that is no A or B of a linear layer"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_followed_is_refused_by_name(
    change: Change, message: str, tmp_path: Path
) -> None:
    config = ModelConfig.load(embedded_model())
    folder = tmp_path / "adapter"
    save_adapter(folder, Lora(config, SETTINGS).factors(), SETTINGS, config, "embedded", "")
    check_adapter(folder, config)
    content = json.loads((folder / CONFIG_FILE).read_text())
    tensors = load_file(str(folder / WEIGHTS_FILE))
    change(content, tensors)
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    save_file(tensors, str(folder / WEIGHTS_FILE))
    with pytest.raises(CheckpointError, match=message):
        check_adapter(folder, config)


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    config = ModelConfig.load(embedded_model())
    with pytest.raises(CheckpointError, match=r"adapter_config.json: got unreadable .*No such file"):
        check_adapter(tmp_path, config)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no such file, but adapter_model.bin.*pickles are not read"):
        check_adapter(tmp_path, config)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: got unreadable"):
        check_adapter(tmp_path, config)
