"""The engine itself on a GPU: tokens per second and milliseconds per forward, its static steps as graphs and without."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from statistics import median

from tokenizers import Tokenizer, models

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.records import DecodePolicy, Trajectory, WeightVersion

REPEATS = 3


@dataclass(frozen=True)
class Load:
    """Requests that run together: each has a prompt of its own, writes `answer` tokens, `per_step` of them a forward."""

    sequences: int
    prompt: int
    answer: int
    per_step: int


@dataclass
class Measured:
    """Of one way to step: seconds of each run, and what the last one was."""

    seconds: list[float] = field(default_factory=list)
    forwards: int = 0
    static_forwards: int = 0
    trajectories: list[Trajectory] = field(default_factory=list)


def engine_over(model: Transformer, load: Load, static: bool) -> Engine:
    """An engine with room for exactly this load."""
    config, weight = model.config, model.head_weight
    blocks = -(-(load.prompt + load.answer) // config.block_size) + 1
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return Engine(
        model,
        Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
        max_sequences=load.sequences,
        weight_version=WeightVersion("random", 0, ""),
        memory_bytes=load.sequences * blocks * config.block_size * numbers * weight.dtype.itemsize,
        static_steps=static,
    )


def requests_of(load: Load, vocabulary: int, run: int) -> list[Request]:
    """The same prompts in every run, so that the prefix cache has them from the second on; answers are drawn anew, so
    that it never has their blocks and every commit is computed."""
    rng = random.Random(0)
    prompts = [
        tuple(rng.randrange(10, vocabulary) for _ in range(load.prompt)) for _ in range(load.sequences)
    ]
    policy = DecodePolicy(kind="static", tokens_per_step=load.per_step, temperature=1.0)
    return [
        Request(
            str(number),
            prompt,
            policy.model_copy(update={"seed": run * load.sequences + number}),
            max_tokens=load.answer,
            ignore_eos=True,
        )
        for number, prompt in enumerate(prompts)
    ]


def measure(model: Transformer, load: Load, repeats: int = REPEATS) -> dict[bool, Measured]:
    """Static steps and the other way, in turns, after one run of each that compiles, captures and fills the cache.

    Raises:
        RuntimeError: the engine took no static step where it should have, or some where it should not.
    """
    engines = {static: engine_over(model, load, static) for static in (True, False)}
    measured = {static: Measured() for static in engines}
    for repeat in range(repeats + 1):
        requests = requests_of(load, model.config.vocab_size, repeat)
        for static, engine in engines.items():
            before = engine.stats()
            start = time.perf_counter()
            trajectories = engine.generate(requests)
            seconds = time.perf_counter() - start
            after, one = engine.stats(), measured[static]
            if repeat:
                one.seconds.append(seconds)
            one.forwards = int(after["forwards"] - before["forwards"])
            one.static_forwards = int(after["static_forwards"] - before["static_forwards"])
            one.trajectories = trajectories
            if (one.static_forwards > 0) != static:
                raise RuntimeError(f"static_steps={static}, yet {one.static_forwards} static forwards")
    return measured


def tokens_per_s(one: Measured) -> float:
    """Tokens of all requests per second, median over runs."""
    return sum(trajectory.num_tokens for trajectory in one.trajectories) / median(one.seconds)


def ms_per_forward(one: Measured) -> float:
    """Milliseconds from one forward's begin to the next's, the host's work included."""
    return median(one.seconds) / one.forwards * 1e3


def share_of_equal_tokens(measured: dict[bool, Measured]) -> float:
    """Of the tokens written both ways; below 1 only where rounding of other shapes moved a near tie."""
    pairs = zip(measured[True].trajectories, measured[False].trajectories, strict=True)
    same = [(one.canvas_ids == other.canvas_ids).mean() for one, other in pairs]
    return float(sum(same) / len(same))
