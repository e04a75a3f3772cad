"""`fewstep demo`: the main job in one command.

Measure the embedded model, refine it on policy, measure it again, track all of it, serve the result and ask it
through the `openai` client. Writes report.json. Everything it starts ends with it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from fewstep.cluster.deploy import ServeConfig, ServedEndpoint, serve_model, watch
from fewstep.pipelines.settings import RefineConfig
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.config import Config
from fewstep.platform.ports import free_port

MODEL_NAME = "fewstep-tiny"
DEFAULT_PORT = 8000


class DemoConfig(Config):
    """The main job, sized for two cores and a quarter of an hour."""

    out: Path = Path("runs/demo")
    """What the demo writes: report.json, figures, model, trajectories; its run goes to the project's MLflow store."""
    keep_serving: bool = False
    """Stay up and serve after the report, until Ctrl-C."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the endpoint; 0 = any free one."""
    refine: RefineConfig = RefineConfig(steps=1000, max_seconds=270.0)
    """The refinement; its `out` is the demo's."""


def run(config: DemoConfig) -> None:
    """The whole story, in order."""
    from fewstep.cluster.memory import MemoryWatch
    from fewstep.cluster.session import ray_session
    from fewstep.pipelines.refine_job import run as run_refine

    started = time.monotonic()
    free_port("127.0.0.1", config.port)  # a port in use is said now, not after ten minutes of work
    # A demo is a fresh story: an interrupted one is taken up again only by `fewstep refine`.
    settings = config.refine.model_copy(update={"out": config.out, "resume": False})
    with ray_session(need={"CPU": settings.total_cpus}), MemoryWatch() as memory:
        result = run_refine(settings)
        serve = ServeConfig(
            model=result.model_uri, tracking_uri=result.tracking_uri, port=config.port,
            policy=result.served_policy, cpus_per_replica=1.0, name=MODEL_NAME,
        )  # fmt: skip
        print(f"serving {result.model_uri} on loopback", flush=True)
        with serve_model(serve) as endpoint:
            answer = ask(endpoint)
            report = demo_report(result.report, answer, time.monotonic() - started, memory.peak_bytes)
            atomic_write_text(config.out / "report.json", json.dumps(report, indent=2) + "\n")
            print(f"the openai client asked and got:{answer['text']}\n", flush=True)
            print(next_steps(config, result.how_to_open), flush=True)
            if config.keep_serving:
                print(f"serving at {endpoint.base_url}  (Ctrl-C ends it)", flush=True)
                watch(endpoint)


def ask(endpoint: ServedEndpoint) -> dict[str, Any]:
    """One streamed completion of a held-out task through the official client; is the streamed text the answer?"""
    import openai

    from fewstep.pipelines.tasks.family import tasks

    task = tasks(1, 0, held_out=True)[0]
    client = openai.OpenAI(base_url=endpoint.base_url, api_key="unused", max_retries=0)
    stream = client.completions.create(
        model=endpoint.model, prompt=task.prompt, max_tokens=80, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    whole = client.completions.create(model=endpoint.model, prompt=task.prompt, max_tokens=80, temperature=0)
    ok = bool(text) and text == whole.choices[0].text and usage is not None and usage.completion_tokens > 0
    return {"openai_client_ok": ok, "prompt": task.prompt, "text": text}


def demo_report(
    report: dict[str, Any], answer: dict[str, Any], seconds: float, peak_bytes: int
) -> dict[str, Any]:
    """The refine report plus what only the demo knows."""
    return {**report, "serve": answer, "total_seconds": seconds, "peak_rss_bytes": peak_bytes}


def next_steps(config: DemoConfig, how_to_open: str) -> str:
    """What a newcomer can type next."""
    prompt = 'def f(xs):\n    """keep odd; add 3; sum"""'
    body = json.dumps({"model": MODEL_NAME, "prompt": prompt, "max_tokens": 80})
    port = config.port or DEFAULT_PORT
    lines = {
        "report": f"{config.out / 'report.json'}, figure {config.out / 'frontier.png'}",
        "tracking": how_to_open,
        "serve": f"fewstep serve --model {config.out / 'model'} --name {MODEL_NAME} --port {port}",
        "query": f"curl http://127.0.0.1:{port}/v1/completions -H 'content-type: application/json' -d '{body}'",
    }
    return "\n".join(f"{name:<10}{value}" for name, value in lines.items())
