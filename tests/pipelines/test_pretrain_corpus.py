"""Pre-training on a prepared corpus: what a batch holds, what is refused, and a run that is interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.small_checkpoints import CONFIGS, write_small

from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.rows import NO_TARGET, SampleRows
from fewstep.pipelines.corpus import Corpus
from fewstep.pipelines.curriculum import CorpusBatches, plan_step
from fewstep.pipelines.prepare import run as prepare
from fewstep.pipelines.prepare_settings import PrepareConfig
from fewstep.pipelines.pretrain import run
from fewstep.pipelines.pretrain_start import find_start, open_corpus
from fewstep.pipelines.settings import ModelSize, Phase, PretrainConfig
from fewstep.platform.errors import CheckpointError, ConfigError

LENGTH = 64
TEXTS = [f"x{n} = {n}\nprint(x{n} * {n % 5})\n" * (1 + n % 4) for n in range(60)]


def make_corpus(folder: Path, tokenizer: Path | str, texts: list[str] = TEXTS) -> Path:
    source = folder / "texts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": text[:6], "text": text[6:]} for text in texts]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        PrepareConfig(
            sources=(str(source),), tokenizer=str(tokenizer), out=folder / "corpus", sequence_tokens=LENGTH, workers=1,
            prompt_column="prompt",
        )
    )  # fmt: skip
    return folder / "corpus"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every family that is denoised, and a corpus in their tokens."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("sdar", "dream", "fast_dllm_v2", "llama"):
        write_small(folder / name, CONFIGS[name])
    make_corpus(folder, folder / "sdar")
    return folder


def config_of(home: Path, name: str, **changes: Any) -> PretrainConfig:
    block_size = {"sdar": 4, "dream": 32, "fast_dllm_v2": 8}.get(name, 4)
    values = {
        "model": str(home / name), "data": str(home / "corpus"), "steps": 6, "batch_size": 3, "checkpoint_every": 3,
        "warmup_steps": 2, "edit_share": 0.5, "phases": [{"block_size": block_size, "share": 1.0}],
        "trainer": {"precision": "fp32", "compiled": False, "ema_decay": 0.9},
    }  # fmt: skip
    return PretrainConfig.model_validate(values | changes)


def batches(config: PretrainConfig) -> CorpusBatches:
    corpus = open_corpus(config.data)
    assert corpus is not None
    start = find_start(config, corpus)
    return CorpusBatches(config, start.model, start.tokenizer, corpus)


def test_an_epoch_shows_every_sequence_once_in_an_order_of_its_own(home: Path) -> None:
    config = config_of(home, "sdar")
    size = len(Corpus(home / "corpus"))
    stream = batches(config)
    epochs = [[stream.sequence(epoch * size + index) for index in range(size)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(size))
    assert epochs[0] != epochs[1]
    again = batches(config)
    assert [again.sequence(size + index) for index in range(size)] == epochs[1]
    other = batches(config.model_copy(update={"seed": 1}))
    assert [other.sequence(index) for index in range(size)] != epochs[0]


def targets_by_document(sample: SampleRows) -> dict[int, list[int]]:
    learned = sample.targets != NO_TARGET
    masked = learned & (sample.copies > 0)
    return {
        int(d): sorted(sample.positions[masked & (sample.documents == d)].tolist())
        for d in np.unique(sample.documents)
    }


@pytest.mark.parametrize("name", ["sdar", "dream", "fast_dllm_v2"])
def test_a_sample_is_a_packed_sequence_whose_answers_are_each_learned_once(home: Path, name: str) -> None:
    """Complementary masks supervise each answer token once; the prompt and what no row predicts, never."""
    config = config_of(home, name, edit_share=0.0)
    stream, corpus = batches(config), Corpus(home / "corpus")
    start = find_start(config, corpus)
    samples = stream.draw(0)
    assert any(sample.documents.max() > 0 for sample in samples)
    for index, sample in enumerate(samples):
        pieces = corpus[stream.sequence(index)]
        clean = sample.copies == 0
        for document, positions in targets_by_document(sample).items():
            piece = pieces[document]
            own = sample.tokens[clean & (sample.documents == document)]
            np.testing.assert_array_equal(own[: len(piece.tokens)], piece.tokens)
            assert (own[len(piece.tokens) :] == start.model.eos_token_id).all()
            assert positions == list(range(max(piece.num_prompt, int(start.model.logit_shift)), len(own)))
    assert sum(float(sample.weights.sum()) for sample in samples) > 0.5


def test_edits_write_text_and_keep_special_tokens_out(home: Path) -> None:
    config = config_of(home, "sdar", edit_share=1.0)
    start = find_start(config, Corpus(home / "corpus"))
    special = {start.model.mask_token_id, start.model.pad_token_id}
    changed = 0
    for sample in batches(config).draw(0) + batches(config).draw(1):
        masks = {
            (d, c) for d, c, t in zip(sample.documents, sample.copies, sample.tokens, strict=True)
            if t == start.model.mask_token_id
        }  # fmt: skip
        for document, copy in {*zip(sample.documents.tolist(), sample.copies.tolist(), strict=True)}:
            if copy == 0 or (document, copy) in masks:
                continue
            state = (sample.documents == document) & (sample.copies == copy)
            assert not special & set(sample.tokens[state].tolist())
            learned = state & (sample.targets != NO_TARGET)
            changed += int((sample.tokens[learned] != sample.targets[learned]).sum())
    assert changed > 0


def test_rates_rise_unweighted_and_a_phase_has_its_own_range() -> None:
    config = PretrainConfig(
        steps=100, rate_warmup_steps=50, size=ModelSize(block_size=4),
        phases=(Phase(block_size=4, share=0.5), Phase(block_size=4, share=0.5, mask_rates=(0.45, 0.95))),
    )  # fmt: skip
    plans = [plan_step(config, step) for step in range(100)]
    assert plans[0].mask_rates == (0.1, 0.25)
    highs = [plan.mask_rates[1] for plan in plans[:50]]
    assert highs == sorted(highs)
    assert [plan.weighted for plan in plans] == [False] * 50 + [True] * 50
    assert plans[60].mask_rates == (0.45, 0.95)


def test_what_does_not_fit_is_refused_before_work(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fewstep convert"):
        run(config_of(home, "llama"))
    with pytest.raises(ConfigError, match="block size 4"):
        run(config_of(home, "sdar", phases=[{"block_size": 8, "share": 1.0}]))
    with pytest.raises(ConfigError, match="fewstep prepare"):
        run(config_of(home, "sdar", data=""))
    other = make_corpus(tmp_path / "embedded", "")
    with pytest.raises(ConfigError, match="another tokenizer"):
        run(config_of(home, "sdar", data=str(other)))
    with pytest.raises(CheckpointError, match=r"corpus\.json"):
        run(config_of(home, "sdar", data=str(tmp_path)))


@pytest.mark.ray
def test_a_given_model_learns_resumes_exactly_and_refuses_other_data(home: Path, tmp_path: Path) -> None:
    config = config_of(
        home, "sdar", out=tmp_path / "run", learning_rate=1e-2, decay_share=0.0, edit_share=0.2
    )
    with ray_session(num_cpus=1):
        run(config)
        whole, _ = load_model(config.out / "model")
        shutil.rmtree(config.out / "model")
        run(config)  # from the checkpoint of step 3
        resumed, _ = load_model(config.out / "model")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    before, _ = load_model(home / "sdar")
    assert not torch.equal(before.state_dict()["norm.weight"], whole.state_dict()["norm.weight"])
    assert (config.out / "model" / "config.json").read_text() == (home / "sdar" / "config.json").read_text()
    other = make_corpus(tmp_path / "other", home / "sdar", TEXTS[:30])
    with pytest.raises(ConfigError, match="other data"):
        run(config.model_copy(update={"data": str(other)}))
    # The same path with other content is other data, too.
    moved = home / "corpus"
    moved.rename(tmp_path / "kept")
    shutil.copytree(other, moved)
    try:
        with pytest.raises(ConfigError, match="other data"):
            run(config)
    finally:
        shutil.rmtree(moved)
        (tmp_path / "kept").rename(moved)
