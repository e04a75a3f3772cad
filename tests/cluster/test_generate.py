"""`fewstep generate`: the film of a canvas, and a real answer from a real (random) model."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from fewstep.cluster.generate import GenerateConfig, film_strip, run
from fewstep.kernels.model.checkpoint import save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.pipelines.film_strip import token_texts
from fewstep.pipelines.tasks.vocabulary import EOS, MASK, PAD, build_tokenizer
from fewstep.platform.errors import CheckpointError
from fewstep.platform.records import DecodePolicy, Trajectory

PROMPT = "def f(x):\n    return x"


def trajectory(prompt_length: int, step_map: list[int], num_tokens: int) -> Trajectory:
    return Trajectory(
        prompt_ids=np.zeros(prompt_length, np.int32),
        canvas_ids=np.arange(len(step_map), dtype=np.int32),
        step_map=np.array(step_map, np.int16),
        confidence=np.ones(len(step_map), np.float32),
        logprob=np.zeros(len(step_map), np.float32),
        num_tokens=num_tokens,
        forwards=3,
        finish_reason="stop",
        policy=DecodePolicy(),
        seed=0,
        weight_version_first="a:0:b",
        weight_version_last="a:0:b",
    )


def test_film_shows_each_forward_of_each_block() -> None:
    # Prompt of 2 in blocks of 4: the canvas begins in the middle of block 0.
    film = film_strip(trajectory(2, [1, 0, 2, 2, -1], num_tokens=4), list("abcde"), block_size=4)
    assert film.splitlines() == [
        "block 0, positions 0 to 1",
        "     1 ░[b]",
        "     2 [a]b",
        "block 1, positions 2 to 4",
        "     3 [c][d]░",
        "4 tokens in 3 forwards: 1.33 tokens per forward (stop)",
    ]


def test_line_breaks_do_not_break_the_film() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode("x\n").ids
    shown = trajectory(0, [0] * len(ids), len(ids))
    texts = token_texts(tokenizer, Trajectory(**{**vars(shown), "canvas_ids": np.array(ids, np.int32)}))
    assert "\n" not in "".join(texts)
    assert "⏎" in "".join(texts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=128,
        block_size=8,
        mask_token_id=tokenizer.token_to_id(MASK),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    net = Transformer(config)
    net.initialise(0)
    folder = tmp_path_factory.mktemp("generate") / "model"
    save_model(folder, net.state_dict(), config, tokenizer)
    return folder


def test_steps_add_a_film_and_change_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenerateConfig(
        model=str(model), prompt=PROMPT, max_tokens=12, policy=DecodePolicy(threshold=0.5, seed=1)
    )
    run(config)
    plain = capsys.readouterr()
    run(config.model_copy(update={"show": "steps"}))
    filmed = capsys.readouterr()
    assert plain.err == ""
    assert plain.out == filmed.out
    assert "tokens per forward" in filmed.err
    assert filmed.err.startswith("block ")


def test_the_prompt_may_come_from_standard_input(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(GenerateConfig(model=str(model), prompt=PROMPT, max_tokens=8))
    given = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    run(GenerateConfig(model=str(model), max_tokens=8))
    assert capsys.readouterr().out == given


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(GenerateConfig(model=str(tmp_path), prompt=PROMPT))
