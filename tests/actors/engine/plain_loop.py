"""A random tiny model, its tokenizer, and the plain decoding loop that the engine must agree with."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.attention import visibility
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.platform.records import DecodePolicy, WeightVersion
from fewstep.platform.rng import derive_seed

MASK, EOS, PAD = 0, 1, 2
VERSION = WeightVersion("test", 0, "0" * 32)
# Half of the words have two characters, so that a stop string can begin inside a token.
WORDS = ["<|mask|>", "<|eos|>", "<|pad|>", *"abcdefghijklm", *(f"{c}{c.upper()}" for c in "nopqrstuvwxyz")]
WORDS += ["\n", " ", ".", ";"]


@dataclass(frozen=True)
class PlainResult:
    canvas: list[int]
    step_map: list[int]
    logprob: list[float]
    num_tokens: int
    forwards: int
    finish_reason: str


def build_model(seed: int = 0) -> Transformer:
    """Random weights turned up until they behave like a model: contexts matter, confidences spread over (0, 1),
    and a fair share of completions meets an end of sequence."""
    config = ModelConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=70,
        block_size=8,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Transformer(config)
    model.initialise(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "q_norm.weight")):
                parameter.mul_(3.0)
        model.embed_tokens.weight.mul_(50.0)
        model.embed_tokens.weight[EOS] *= 1.5
        model.norm.weight.mul_(0.75)
    return model.eval()


def build_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<|pad|>")
    )
    tokenizer.add_special_tokens(["<|mask|>", "<|eos|>", "<|pad|>"])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def plain_decode(
    model: Transformer, request: Request, swap: tuple[int, Transformer] | None = None
) -> PlainResult:
    """One request, position by position: no cache, no packing, the full visibility mask every time.

    Args:
        swap: (step, model) from which on another model decides.
    """
    size, start = model.config.block_size, len(request.prompt_ids)
    limit, step = start + request.max_tokens, 0
    tokens, step_map, logprob = list(request.prompt_ids), [-1] * start, [float("nan")] * start
    for block in range(start // size, model.config.max_position_embeddings // size):
        first, end = block * size, (block + 1) * size
        num_new = end - len(tokens)
        tokens += [MASK] * num_new
        step_map += [-1] * num_new
        logprob += [float("nan")] * num_new
        block_step = 0
        while MASK in tokens:
            current = swap[1] if swap and step >= swap[0] else model
            opened = open_positions(current, tokens, request.policy, step, block_step)
            for position, (token, value) in opened.items():
                tokens[position], logprob[position], step_map[position] = token, value, step
            ends = [p for p in range(max(start, first), end) if tokens[p] == EOS]
            for position in range(ends[0] + 1 if ends else end, end):
                if tokens[position] == MASK:
                    tokens[position], step_map[position] = EOS, step
            step, block_step = step + 1, block_step + 1
            first_mask = tokens.index(MASK) if MASK in tokens else end
            stopped = bool(ends) and ends[0] < limit
            if first_mask >= (ends[0] if stopped else limit):
                num_tokens = (ends[0] + 1 if stopped else limit) - start
                reason = "stop" if stopped else "length"
                return PlainResult(
                    tokens[start:], step_map[start:], logprob[start:], num_tokens, step, reason
                )
    raise AssertionError("a request that fits the context ends inside it")


def open_positions(
    model: Transformer, tokens: list[int], policy: DecodePolicy, step: int, block_step: int
) -> dict[int, tuple[int, float]]:
    """Position to (token, log-probability) of what one forward over everything opens."""
    positions = torch.arange(len(tokens))[None]
    visible = visibility(positions, torch.zeros_like(positions), model.config.block_size)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([tokens]), positions, masked_attention(visible)))[0]
    chosen = {p: choose(logits[p], policy, p, step) for p, token in enumerate(tokens) if token == MASK}
    best = sorted(chosen, key=lambda p: (-chosen[p][1], p))
    if policy.max_steps_per_block is not None and block_step + 1 >= policy.max_steps_per_block:
        return chosen
    if policy.kind == "static":
        return {p: chosen[p] for p in best[: policy.tokens_per_step]}
    return {p: chosen[p] for p in best if math.exp(chosen[p][1]) >= policy.threshold or p == best[0]}


def choose(logits: torch.Tensor, policy: DecodePolicy, position: int, step: int) -> tuple[int, float]:
    """(token, untempered log-probability) of one row, written from the definition."""
    logprobs = logits.log_softmax(-1).tolist()
    if policy.temperature == 0:
        token = int(logits.argmax())
        return token, logprobs[token]
    weight = (logits / policy.temperature).softmax(-1).tolist()
    mass = 0.0
    for token in sorted(range(len(weight)), key=lambda t: -weight[t]):
        mass, before = mass + weight[token], mass
        if before >= policy.top_p:
            weight[token] = 0.0
    target = ((derive_seed(policy.seed, position, step) >> 31) + 0.5) / 2**32 * sum(weight)
    token = next(t for t, reached in enumerate(itertools.accumulate(weight)) if reached > target)
    return token, logprobs[token]


def engine_of(max_sequences: int = 8, seed: int = 0) -> Engine:
    """An engine over a model of its own: engines write weights into theirs."""
    return Engine(build_model(seed), build_tokenizer(), max_sequences=max_sequences, weight_version=VERSION)


def draw_request(rng: random.Random, name: str, stop: tuple[str, ...] = ()) -> Request:
    """A request of any policy; lengths and block boundaries fall everywhere."""
    size = rng.randint(1, 40)
    kind = rng.choice(["threshold", "static"])
    threshold, tokens_per_step = rng.choice([0.3, 0.6, 0.9]), rng.choice([1, 2, 5])
    policy = DecodePolicy(
        kind=kind,
        threshold=threshold if kind == "threshold" else 0.9,
        tokens_per_step=tokens_per_step if kind == "static" else 1,
        max_steps_per_block=rng.choice([None, None, 1, 3]),
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_p=rng.choice([1.0, 0.8]),
        seed=rng.randrange(2**63),
    )
    prompt = tuple(rng.randrange(1, len(WORDS)) for _ in range(size))
    return Request(name, prompt, policy, max_tokens=rng.randint(1, 64 - size), stop=stop)
