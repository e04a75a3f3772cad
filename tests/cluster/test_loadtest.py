"""`fewstep loadtest` against the real application, and its arithmetic against numbers known beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.actors.serving import conftest as serving
from tests.actors.serving.conftest import listening

from fewstep.__main__ import main
from fewstep.actors.serving.access_log import LogConfig
from fewstep.actors.serving.desk import Desk, DeskOptions
from fewstep.actors.serving.limits import LimitsConfig
from fewstep.actors.serving.service import CompletionService
from fewstep.cluster.loadtest import load, run
from fewstep.cluster.loadtest_settings import LoadtestConfig
from fewstep.pipelines.load_summary import Sample, abort_delays, arrivals, percentiles, summarise
from fewstep.platform.config import load_config
from fewstep.platform.errors import ConfigError, ResourceError

model_folder, service = serving.model_folder, serving.service


@pytest.fixture
def url(service: CompletionService) -> Iterator[str]:
    with listening(service) as address:
        yield address


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt {index}"}) + "\n" for index in range(5)))
    return path


def test_a_closed_loop_reports_what_the_engine_did(
    url: str,
    prompts: Path,
    tmp_path: Path,
    service: CompletionService,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = int(service.host.stats()["committed_tokens"])
    config = LoadtestConfig(
        url=url, out=tmp_path / "out", clients=4, requests=20, max_tokens=40, prompts=prompts
    )
    run(config)
    report = json.loads((tmp_path / "out" / "load.json").read_text())
    assert (report["requests"], report["answered"], report["errors"]) == (20, 20, {})
    assert report["committed_tokens"] == int(service.host.stats()["committed_tokens"]) - before
    assert report["tokens_per_forward"] > 0
    assert report["committed_tokens_per_s"] == pytest.approx(report["committed_tokens"] / report["seconds"])
    for name in ("first_block_s", "block_s", "request_s"):
        assert 0 < report[name]["p50"] <= report[name]["p95"] <= report[name]["p99"]
    assert (tmp_path / "out" / "load.png").read_bytes().startswith(b"\x89PNG")
    assert "committed/s" in capsys.readouterr().out


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_an_open_loop_sends_when_requests_are_due(url: str, prompts: Path, endpoint: str) -> None:
    config = LoadtestConfig.model_validate(
        {"url": url, "loop": "open", "rate": 40, "requests": 20, "max_tokens": 16, "prompts": prompts,
         "endpoint": endpoint, "stream": endpoint == "chat"}
    )  # fmt: skip
    report, samples = load(config)
    assert report["answered"] == 20
    assert [sample.due for sample in samples] == arrivals(40, 20, 0)
    assert all(sample.sent >= sample.due for sample in samples)
    assert (report["block_s"] is None) == (endpoint == "completions")


def test_aborts_are_no_errors_and_free_their_slots(
    url: str, prompts: Path, service: CompletionService
) -> None:
    config = LoadtestConfig(
        url=url, clients=8, requests=24, max_tokens=1900, prompts=prompts, abort_share=1.0, abort_within_s=0.2,
        fields={"temperature": 0, "fewstep": {"kind": "static", "tokens_per_step": 1}},
    )  # fmt: skip
    report, _ = load(config)
    assert (report["aborted"], report["errors"]) == (24, {})


def test_refusals_are_reported_by_their_code(
    service: CompletionService, prompts: Path, tmp_path: Path
) -> None:
    options = DeskOptions(LimitsConfig(key_requests_per_minute=3.0), LogConfig(file=tmp_path / "log.jsonl"))
    with listening(service, desk=Desk(options, lambda: {"tiny": service.host})) as address:
        report, _ = load(LoadtestConfig(url=address, clients=1, requests=6, max_tokens=8, prompts=prompts))
    assert report["answered"] == 3
    assert report["errors"] == {"429 rate_limit_exceeded": 3}
    assert report["error_share"] == 0.5


def test_no_server_and_no_prompts_are_the_users_mistakes(tmp_path: Path, url: str) -> None:
    with pytest.raises(ResourceError, match="fewstep serve"):
        run(LoadtestConfig(url="http://127.0.0.1:9"))
    (tmp_path / "bad").write_text('{"text": "x"}\n')
    with pytest.raises(ConfigError, match="KeyError"):
        run(LoadtestConfig(url=url, prompts=tmp_path / "bad"))
    for wrong in (["loop=open"], ["rate=3"]):
        with pytest.raises(ConfigError, match="loop=open with a rate"):
            load_config(LoadtestConfig, None, wrong)
    assert main(["loadtest", "http://127.0.0.1:1", "--dry-run"]) == 0


def test_arrivals_are_poisson_and_keyed() -> None:
    drawn = np.diff(arrivals(50.0, 20_000, 3))
    assert drawn.mean() == pytest.approx(1 / 50, rel=0.05)
    assert drawn.std() == pytest.approx(1 / 50, rel=0.05)
    assert arrivals(50.0, 10, 3) == arrivals(50.0, 10, 3) != arrivals(50.0, 10, 4)
    delays = abort_delays(0.25, 2.0, 20_000, 3)
    leaving = [delay for delay in delays if delay is not None]
    assert len(leaving) / len(delays) == pytest.approx(0.25, abs=0.02)
    assert max(leaving) <= 2.0


def test_a_summary_counts_latency_from_when_a_request_was_due() -> None:
    samples = [
        Sample(0.0, 0.5, [1.0, 1.5, 3.5], 3.5, tokens=30, forwards=10, status=200),
        Sample(1.0, 1.0, [2.0], 2.0, tokens=10, forwards=10, status=200),
        Sample(1.0, 1.0, [], 1.2, status=429, error="429 queue_full"),
        Sample(1.0, 1.0, [1.1], 1.2, status=200, aborted=True),
        Sample(1.0, 1.0, [], 1.2, status=500, error="500 internal"),
    ]
    report = summarise(samples, 4.0)
    assert (report["answered"], report["aborted"], report["errors_5xx"]) == (2, 1, 1)
    assert (report["committed_tokens_per_s"], report["tokens_per_forward"]) == (10.0, 2.0)
    assert report["first_block_s"]["mean"] == 1.0
    assert report["block_s"]["mean"] == pytest.approx(1.25)
    assert report["error_share"] == pytest.approx(0.4)
    assert summarise([], 0.0)["request_s"] is None
    assert percentiles([1.0, 2.0, 3.0]) == pytest.approx({"p50": 2.0, "p95": 2.9, "p99": 2.98, "mean": 2.0})
