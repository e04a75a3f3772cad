"""The autoregressive baseline against the library's own greedy loop, and its keyed draws."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.actors.autoregressive import AutoregressiveModel
from fewstep.actors.engine.request import Request
from fewstep.actors.engine.text import decode
from fewstep.kernels.model.checkpoint import embedded_model
from fewstep.platform.errors import CheckpointError, RequestError
from fewstep.platform.records import DecodePolicy

transformers: Any = pytest.importorskip("transformers")
PROMPTS = ['def f(xs):\n    """keep odd; add 3; sum"""', "def f(xs):", "x", "return [i for i in xs]\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with the embedded model's tokenizer, that writes the end of sequence now and then."""
    path = tmp_path_factory.mktemp("llama")
    torch.set_num_threads(1)
    tokenizer = (embedded_model() / "tokenizer.json").read_text()
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=7, bos_token_id=None, initializer_range=0.6,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> AutoregressiveModel:
    return AutoregressiveModel(folder, max_sequences=3)


def request_of(model: AutoregressiveModel, prompt: str, **settings: Any) -> Request:
    policy = DecodePolicy(kind="static", **settings.pop("policy", {}))
    ids = tuple(model.tokenizer.encode(prompt).ids)
    return Request(prompt, ids, policy, settings.pop("max_tokens", 20), **settings)


def test_tokens_are_those_of_a_plain_greedy_loop(model: AutoregressiveModel, folder: Path) -> None:
    plain = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    found = model.generate([request_of(model, prompt) for prompt in PROMPTS])
    for prompt, trajectory in zip(PROMPTS, found, strict=True):
        ids = list(model.tokenizer.encode(prompt).ids)
        expected: list[int] = []
        while len(expected) < 20 and expected[-1:] != [7]:
            with torch.inference_mode():
                expected.append(int(plain(torch.tensor([ids + expected])).logits[0, -1].argmax()))
        assert trajectory.canvas_ids.tolist() == expected
        assert trajectory.prompt_ids.tolist() == ids
        assert trajectory.forwards == trajectory.num_tokens == len(expected)
        assert trajectory.step_map.tolist() == list(range(len(expected)))
        assert trajectory.finish_reason == ("stop" if expected[-1] == 7 else "length")


def test_an_end_token_and_a_stop_string_end_an_answer(model: AutoregressiveModel) -> None:
    (whole,) = model.generate([request_of(model, PROMPTS[0])])
    ids = whole.canvas_ids.tolist()
    place = next(place for place in range(3, len(ids)) if ids[place] not in ids[:place])
    (ended,) = model.generate([request_of(model, PROMPTS[0], stop_ids=(ids[place],))])
    assert ended.canvas_ids.tolist() == ids[: place + 1]
    assert ended.finish_reason == "stop"
    text = decode(model.tokenizer, ids)
    middle = text[len(text) // 2 : len(text) // 2 + 3]
    (stopped,) = model.generate([request_of(model, PROMPTS[0], stop=(middle,))])
    shown = decode(model.tokenizer, stopped.completion_ids.tolist())
    assert text[: text.index(middle)].startswith(shown)
    assert middle not in shown
    assert stopped.forwards < whole.forwards


def test_draws_are_keyed_and_do_not_depend_on_the_batch(model: AutoregressiveModel) -> None:
    settings = {"policy": {"temperature": 1.0, "top_p": 0.9}}
    requests = [request_of(model, prompt, **settings) for prompt in PROMPTS]
    together = model.generate(requests)
    for request, trajectory in zip(requests, together, strict=True):
        (alone,) = model.generate([request])
        assert alone.canvas_ids.tolist() == trajectory.canvas_ids.tolist()
    other = request_of(model, PROMPTS[0], policy={"temperature": 1.0, "top_p": 0.9, "seed": 1})
    assert model.generate([other])[0].canvas_ids.tolist() != together[0].canvas_ids.tolist()


def test_drawn_tokens_follow_the_distribution(model: AutoregressiveModel, folder: Path) -> None:
    plain = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    ids = model.tokenizer.encode(PROMPTS[1]).ids
    with torch.inference_mode():
        weight = (plain(torch.tensor([ids])).logits[0, -1].double() / 0.7).softmax(-1)
    requests = [
        request_of(model, PROMPTS[1], max_tokens=1, policy={"temperature": 0.7, "seed": seed})
        for seed in range(600)
    ]
    counts = Counter(int(one.canvas_ids[0]) for one in model.generate(requests))
    best = weight.topk(3).indices.tolist()
    # Four standard errors of a share; chance leaves them once in ten thousand runs, and the seeds are fixed.
    for token in best:
        share = float(weight[token])
        assert counts[token] / 600 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 600))


def test_what_cannot_be_asked_is_refused(model: AutoregressiveModel) -> None:
    with pytest.raises(RequestError, match="suffix"):
        model.check(request_of(model, "x", suffix_ids=(3,)))
    with pytest.raises(RequestError, match="at most 64"):
        model.check(request_of(model, "x", max_tokens=100))


def test_a_folder_that_is_no_such_model_is_named(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(CheckpointError, match="unheard-of"):
        AutoregressiveModel(tmp_path)


def test_a_partial_checkpoint_is_refused(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: model\.norm\.weight"):
        AutoregressiveModel(tmp_path)
