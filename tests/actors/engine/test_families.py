"""Checkpoints in other projects' formats, denoised by the engine: the tokens of the definition, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench.small_checkpoints import CONFIGS, write_small

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.attention import visibility
from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.platform.errors import CheckpointError, RequestError
from fewstep.platform.records import DecodePolicy, WeightVersion

REFUSED = ("llama", "qwen2", "qwen3")
SERVED = tuple(name for name in CONFIGS if name not in REFUSED)
PROMPT = (7, 3, 90, 14, 55)
VERSION = WeightVersion("families", 0, "0" * 32)


def engine_of(folder: Path) -> Engine:
    model, tokenizer = load_model(folder)
    return Engine(model, tokenizer, max_sequences=2, weight_version=VERSION)


def logits_of(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """[R, V]: row p holds what the model says of position p, whatever row says it."""
    positions = torch.arange(len(tokens))[None]
    visible = visibility(positions, torch.zeros_like(positions), model.config.sees_block)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([tokens]), positions, masked_attention(visible)))[0]
    return logits.roll(1, 0) if model.config.logit_shift else logits


def plain_decode(model: Transformer, max_tokens: int, size: int) -> list[int]:
    """The most confident masked position of the live block, one a step."""
    mask, end = model.config.mask_token_id, len(PROMPT) + max_tokens
    whole = model.config.attention_kind == "bidirectional"
    tokens = [*PROMPT, *([mask] * max_tokens if whole else [])]
    first = len(PROMPT) if whole else len(PROMPT) // size * size
    for start in range(first, end, size):
        stop = min(start + size, end) if whole else start + size
        tokens += [mask] * (stop - len(tokens))
        while mask in tokens[start:stop]:
            logprobs = logits_of(model, tokens).log_softmax(-1)
            left = [p for p in range(start, stop) if tokens[p] == mask]
            best = max(left, key=lambda p: (float(logprobs[p].max()), -p))
            tokens[best] = int(logprobs[best].argmax())
    return tokens[len(PROMPT) : end]


@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_those_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    engine = engine_of(write_small(tmp_path / name, CONFIGS[name]))
    bidirectional = engine.config.attention_kind == "bidirectional"
    size = 4 if bidirectional else engine.config.block_size
    policy = DecodePolicy(kind="static", block_size=size)
    request = Request("a", PROMPT, policy, max_tokens=13, ignore_eos=True)
    expected = plain_decode(engine.model, 13, size)
    assert engine.generate([request])[0].completion_ids.tolist() == expected
    assert len(set(expected)) > 3, "a model that repeats itself would agree with anything"


@pytest.mark.parametrize("name", [name for name in REFUSED if name in CONFIGS])
def test_what_the_engine_cannot_denoise_is_refused_at_the_door(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attention_kind"):
        engine_of(write_small(tmp_path / name, CONFIGS[name]))


def test_shifted_logits_take_no_approximate_cache(tmp_path: Path) -> None:
    engine = engine_of(write_small(tmp_path / "dream", CONFIGS["dream"]))
    with pytest.raises(RequestError, match="shifted"):
        engine.add(Request("a", PROMPT, DecodePolicy(cache="dual", block_size=4), max_tokens=8))
