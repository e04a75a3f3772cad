"""Tokens a second through HTTP over those of the engine without it: same model, prompts, policy and batch, in turn."""

from __future__ import annotations

import asyncio
import itertools
import time
from statistics import median
from typing import Any

import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.cluster.deploy import ServeConfig, serve_model
from fewstep.cluster.load_client import LoadClient
from fewstep.kernels.model.checkpoint import load_model
from fewstep.pipelines.load_summary import summarise
from fewstep.pipelines.models import model_folder
from fewstep.pipelines.tasks.family import tasks
from fewstep.platform.records import DecodePolicy, WeightVersion

MAX_TOKENS = 80


def measure(clients: int, requests: int, rounds: int) -> dict[str, Any]:
    """Rounds of: the engine alone, whole answers over HTTP, streams over HTTP; medians of the ratios within a round.

    Args:
        clients: requests at a time, and slots of both engines.
        requests: of each measurement; all prompts of a round are new to both.
    """
    torch.set_num_threads(1)
    model, tokenizer = load_model(model_folder("", ""))
    engine = Engine(model, tokenizer, max_sequences=clients, weight_version=WeightVersion("bench", 0, "0"))
    prompts = [task.prompt for task in tasks((2 * rounds + 1) * requests, 7, held_out=False)]
    policy = DecodePolicy(temperature=0.0)
    rows: dict[str, list[dict[str, float]]] = {}
    for front in ("replicas", "proxy"):
        config = ServeConfig.model_validate(
            {
                "port": 0,
                "max_sequences": clients,
                "policy": policy,
                "log": {"file": "/dev/null"},
                "front": front,
            }
        )
        with serve_model(config) as endpoint:
            address = f"{endpoint.base_url}/completions"
            _over_http(
                address, endpoint.model, prompts[-requests:], clients, stream=True
            )  # warms both ways up
            _alone(engine, prompts[-requests:], policy)
            rows[front] = [
                _round(
                    engine,
                    policy,
                    address,
                    endpoint.model,
                    prompts[2 * start * requests :][: 2 * requests],
                    clients,
                )
                for start in range(rounds)
            ]
    ratios = {front: _medians(found) for front, found in rows.items()}
    return {
        "http_ratio": ratios["replicas"]["stream"],
        "unit": "committed tokens a second, streamed by the replicas themselves, over those of the engine in process",
        "ratios": ratios,
        "rounds": rows,
        "settings": {
            "clients": clients, "requests": requests, "max_tokens": MAX_TOKENS, "policy": policy.model_dump(),
        },
    }  # fmt: skip


def _round(
    engine: Engine, policy: DecodePolicy, address: str, model: str, prompts: list[str], clients: int
) -> dict[str, float]:
    """Tokens a second: the engine and whole answers on one half of the prompts, the engine and streams on the other."""
    first, second = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    return {
        "engine": _alone(engine, first, policy),
        "whole": _over_http(address, model, first, clients, stream=False),
        "engine_again": _alone(engine, second, policy),
        "stream": _over_http(address, model, second, clients, stream=True),
    }


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {
        "stream": median(row["stream"] / row["engine_again"] for row in rows),
        "whole": median(row["whole"] / row["engine"] for row in rows),
        "engine_tokens_per_s": median(row["engine"] for row in rows),
    }


def _alone(engine: Engine, prompts: list[str], policy: DecodePolicy) -> float:
    requests = [
        Request(f"r{index}", tuple(engine.tokenizer.encode(prompt).ids), policy, MAX_TOKENS)
        for index, prompt in enumerate(prompts)
    ]
    started = time.perf_counter()
    ended = engine.generate(requests)
    return sum(trajectory.num_tokens for trajectory in ended) / (time.perf_counter() - started)


def _over_http(address: str, model: str, prompts: list[str], clients: int, *, stream: bool) -> float:
    shared: dict[str, Any] = {"model": model, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": stream}
    if stream:
        shared["stream_options"] = {"include_usage": True}
    bodies = ({**shared, "prompt": prompt} for prompt in itertools.cycle(prompts))
    client = LoadClient(address, bodies, [], headers={}, timeout_s=300)
    started = time.perf_counter()
    asyncio.run(client.closed_loop(clients, len(prompts), None))
    seconds = time.perf_counter() - started
    report = summarise(client.samples, seconds)
    if report["errors"]:
        raise RuntimeError(f"not a measurement: {report['errors']}")
    return float(report["committed_tokens_per_s"])
