"""An autoregressive baseline in an evaluation: the same tasks, one token a forward, one point of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fewstep.actors.engine.engine import Engine
from fewstep.actors.verifier import LocalVerifier
from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.pipelines.baseline import open_baseline
from fewstep.pipelines.evaluate import evaluate, open_subjects
from fewstep.pipelines.evaluation import Subject
from fewstep.pipelines.evaluation_settings import EvaluateConfig
from fewstep.pipelines.frontier import Generate
from fewstep.pipelines.tasks.benchmarks import load_benchmark
from fewstep.platform.records import WeightVersion

transformers: Any = pytest.importorskip("transformers")
INFILL = {
    "task_id": "SingleLineInfilling/0", "entry_point": "f", "prompt": "def f(x):\n", "suffix": "    return y\n",
    "canonical_solution": "    y = x + 1\n", "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}  # fmt: skip


@contextmanager
def engine(subject: Subject) -> Iterator[Generate]:
    version = WeightVersion("test", 0, subject.weights_sha256)
    yield Engine(*load_model(subject.folder), weight_version=version).generate


def test_it_answers_the_same_tasks_and_no_infilling(tmp_path: Path) -> None:
    folder, file = tmp_path / "llama", tmp_path / "HumanEval-infilling-SingleLine.jsonl"
    file.write_text(json.dumps(INFILL) + "\n")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text((embedded_model() / "tokenizer.json").read_text())
    settings = EvaluateConfig.model_validate(
        {
            "out": tmp_path / "run", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "baseline": folder,
            "benchmarks": [{"name": "family", "num_tasks": 3}, {"name": "humaneval_infilling", "path": file}],
            "sweep": {"thresholds": [0.9], "tokens_per_step": []}, "max_tokens": 64,
        }
    )  # fmt: skip
    benchmarks = [load_benchmark(choice) for choice in settings.benchmarks]
    baseline = open_baseline(folder, 2)
    with LocalVerifier() as verifier:
        results = evaluate(
            settings, open_subjects(settings), benchmarks, engine, verifier, verifier.isolation, baseline
        )
    report = json.loads((settings.out / "report.json").read_text())
    family = report["benchmarks"]["family"]["models"]
    assert len(family["model"]["points"]) > len(family["baseline"]["points"]) == 1
    assert sum(family["baseline"]["points"][0]["outcomes"].values()) == 3
    assert set(report["benchmarks"]["humaneval_infilling_single_line"]["models"]) == {"model"}
    assert report["models"]["baseline"]["pinned"] == str(folder)
    answers = [answer for answer in results.answers if answer.slot == "baseline"]
    asked = [answer for answer in results.answers if answer.slot == "model" and answer.benchmark == "family"]
    assert [answer.task_id for answer in answers] == [answer.task_id for answer in asked[:3]]
    assert all(0 < answer.num_tokens <= answer.forwards for answer in answers)
    assert f"{folder} (autoregressive)" in (settings.out / "report.md").read_text()
    assert (settings.out / "frontier.png").stat().st_size > 10_000
