"""`fewstep loadtest URL`: load on a server that speaks OpenAI's API, and a report of how it held up."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.cluster.load_client import LoadClient
from fewstep.cluster.loadtest_settings import LoadtestConfig
from fewstep.pipelines.load_figure import draw_load
from fewstep.pipelines.load_summary import Sample, abort_delays, arrivals, summarise
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.errors import ConfigError, ResourceError

_ANSWER_S = 10.0
_REPORT_EVERY_S = 2.0
# More arrivals or aborts are not drawn ahead; they repeat.
_MOST_DRAWN = 100_000
_NUM_TASKS = 1000


def run(config: LoadtestConfig) -> None:
    """Load the server, write load.json and load.png, print the report. Ctrl-C reports what there is by then.

    Raises:
        ConfigError: the file of prompts. ResourceError: the server does not answer.
    """
    report, samples = load(config)
    atomic_write_text(config.out / "load.json", json.dumps(report, indent=2) + "\n")
    draw_load(config.out / "load.png", samples, report, title_of(config))
    print(text_of(report))
    print(f"report: {config.out / 'load.json'}, figure {config.out / 'load.png'}")


def load(config: LoadtestConfig) -> tuple[dict[str, Any], list[Sample]]:
    """The report of one test, and every request of it."""
    key = os.environ.get(config.key_variable, "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    model = config.model or _first_model(config.url, headers)
    path = "chat/completions" if config.endpoint == "chat" else "completions"
    client = LoadClient(
        f"{config.url.rstrip('/')}/v1/{path}",
        bodies(config, model),
        abort_delays(config.abort_share, config.abort_within_s, _MOST_DRAWN, config.seed)
        if config.abort_share
        else [],
        headers=headers,
        timeout_s=config.timeout_s,
        on_end=_Progress(config),
    )
    interrupted = False
    try:
        if config.loop == "open":
            asyncio.run(client.open_loop(_due(config)))
        else:
            asyncio.run(client.closed_loop(config.clients, config.requests, config.seconds))
    except KeyboardInterrupt:
        interrupted = True
    samples = [sample for sample in client.samples if sample.ended]
    seconds = max((sample.ended for sample in samples), default=0.0) - min(
        (s.due for s in samples), default=0.0
    )
    settings = config.model_dump(mode="json") | {"model": model}
    report = {
        **summarise(samples, seconds), "interrupted": interrupted, "settings": settings,
        "machine": machine_info(), "commit": git_commit(),
    }  # fmt: skip
    return report, samples


def bodies(config: LoadtestConfig, model: str) -> Iterator[dict[str, Any]]:
    """Bodies of requests, without end.

    Raises:
        ConfigError: the file of prompts is not one.
    """
    shared: dict[str, Any] = {"model": model, "max_tokens": config.max_tokens, **config.fields}
    if config.stream:
        shared |= {"stream": True, "stream_options": {"include_usage": True}}
    # Read now, before anything is sent: a generator would find a broken file at the first request.
    prompts = read_prompts(config.prompts) if config.prompts is not None else _task_prompts()

    def body(prompt: str) -> dict[str, Any]:
        if config.endpoint == "chat":
            return {**shared, "messages": [{"role": "user", "content": prompt}]}
        return {**shared, "prompt": prompt}

    return map(body, itertools.cycle(prompts))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file of JSON lines. Raises ConfigError."""
    try:
        prompts = [
            json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines() if line
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "prompts",
            f"{path}: {type(error).__name__}: {error}",
            "JSON lines with `prompt`",
            "correct the file",
        ) from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError("prompts", f"{path}: no text", "JSON lines with `prompt`", "correct the file")
    return prompts


def text_of(report: dict[str, Any]) -> str:
    """The report as people read it."""
    tpf = report["tokens_per_forward"]
    failed = sum(report["errors"].values())
    counts = f"{report['answered']} answered, {report['aborted']} aborted, {failed} failed"
    per_forward = f", {tpf:.2f} per forward" if tpf else ""
    lines = [
        f"requests  {report['requests']}: {counts}, in {report['seconds']:.1f} s",
        f"tokens    {report['committed_tokens_per_s']:,.1f} committed/s{per_forward}",
    ]
    for name, key in (("first", "first_block_s"), ("block", "block_s"), ("whole", "request_s")):
        found = report[key]
        if found:
            lines.append(
                f"{name:<10}p50 {found['p50']:.3f} s  p95 {found['p95']:.3f} s  p99 {found['p99']:.3f} s"
            )
    lines += [f"error     {count} x {error}" for error, count in report["errors"].items()]
    return "\n".join(lines)


def title_of(config: LoadtestConfig) -> str:
    """What kind of load it was."""
    if config.loop == "open":
        return f"open loop, {config.rate:g} requests/s"
    return f"closed loop, {config.clients} clients"


def _due(config: LoadtestConfig) -> list[float]:
    assert config.rate is not None
    if config.seconds is None:
        return arrivals(config.rate, config.requests, config.seed)
    # Enough draws to reach past the end, with room for a slow stretch.
    expected = config.rate * config.seconds
    drawn = arrivals(config.rate, math.ceil(expected + 10 * math.sqrt(expected) + 10), config.seed)
    return [moment for moment in drawn if moment < config.seconds]


def _task_prompts() -> list[str]:
    from fewstep.pipelines.tasks.family import tasks

    return [task.prompt for task in tasks(_NUM_TASKS, 0, held_out=True)]


def _first_model(url: str, headers: dict[str, str]) -> str:
    address = f"{url.rstrip('/')}/v1/models"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, headers=headers), timeout=_ANSWER_S
        ) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ResourceError(
            "url", f"{address}: {error}", "a server that speaks OpenAI's API", "start one: fewstep serve"
        ) from error


class _Progress:
    """A line on standard error every other second, where somebody looks at it."""

    def __init__(self, config: LoadtestConfig) -> None:
        self._config, self._started, self._told, self._ended = config, time.monotonic(), 0.0, 0
        self._shown = sys.stderr.isatty()

    def __call__(self, sample: Sample) -> None:
        self._ended += 1
        now = time.monotonic()
        if self._shown and now - self._told > _REPORT_EVERY_S:
            self._told, passed = now, now - self._started
            of = (
                f"{self._config.seconds:.0f} s"
                if self._config.seconds
                else f"{self._config.requests} requests"
            )
            print(
                f"\r{self._ended} requests ended after {passed:.0f} s of {of}",
                end="",
                file=sys.stderr,
                flush=True,
            )
