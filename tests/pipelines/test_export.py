"""An exported model: others can load it, and its card says what the jobs recorded and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from bench.small_checkpoints import CONFIGS, write_small
from transformers import AutoTokenizer

from fewstep.kernels.model.checkpoint import embedded_model, load_model, state_checksum
from fewstep.pipelines.convert import convert_model
from fewstep.pipelines.distill_settings import DistillConfig
from fewstep.pipelines.export import run
from fewstep.pipelines.export_settings import ExportConfig
from fewstep.pipelines.settings import PretrainConfig
from fewstep.platform.config import render_config
from fewstep.platform.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def converted_run(home: Path) -> Path:
    """A run folder as a conversion with training leaves it."""
    source = write_small(home / "source", CONFIGS["llama"])
    run_folder = home / "trained"
    convert_model(source, run_folder / "start", 4)
    shutil.copytree(run_folder / "start", run_folder / "model")
    corpus = home / "corpus"
    corpus.mkdir()
    counts = {"num_documents": 1234, "num_tokens": 56789, "num_bad_rows": 3, "digest": "d" * 64}
    (corpus / "corpus.json").write_text(json.dumps(counts))
    config = PretrainConfig.model_validate(
        {"model": str(run_folder / "start"), "data": str(corpus), "steps": 77, "seed": 5, "out": run_folder,
         "phases": [{"block_size": 2, "share": 0.25}, {"block_size": 4, "share": 0.75}]}
    )  # fmt: skip
    (run_folder / "config.yaml").write_text(render_config(config))
    (run_folder / "metrics.jsonl").write_text(json.dumps({"step": 77, "nll_per_token": 0.4321}) + "\n")
    return run_folder


def test_the_card_tells_data_stages_and_that_nothing_was_measured(tmp_path: Path) -> None:
    folder = converted_run(tmp_path)
    run(ExportConfig(path=str(folder), out=tmp_path / "out", license="apache-2.0"))
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0"
    assert "1,234 documents, 56,789 tokens (3 bad rows left out), digest `dddddddddddddddd`" in card
    first, second = (
        card.index("1. **convert**: from llama to stable_diffcoder"),
        card.index("2. **pretrain**: 77 steps"),
    )
    assert first < second
    assert "block sizes 2 for 25%, 4 for 75%" in card
    assert "0.4321 nats" in card
    assert f"It began as `{tmp_path / 'source'}`" in card
    assert "Not measured" in card
    assert "list functions" not in card
    before, after = load_model(folder / "model")[0], load_model(tmp_path / "out")[0]
    assert state_checksum(before.state_dict()) == state_checksum(after.state_dict())


def test_the_card_holds_the_frontier_of_a_refinement(tmp_path: Path) -> None:
    folder = tmp_path / "refined"
    shutil.copytree(embedded_model(), folder / "model")
    report = json.loads((ROOT / "bench" / "results" / "refine-tiny.json").read_text())
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text(yaml.safe_dump(report["settings"]))
    run(ExportConfig(path=str(folder), out=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    best = report["after"]
    assert f"| {best['label']} | {best['pass_at_1']:.3f} | {best['forwards_per_answer']:.2f} |" in card
    assert card.count("| threshold_") == sum(
        p["policy"]["kind"] == "threshold" for p in report["frontier_after"]
    )
    assert "list functions" in card
    assert report["machine"]["cpu"] in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(xs):\n    return [x * 2 for x in xs]"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.mask_token == "<|mask|>"


def test_a_model_without_records_says_so_and_out_must_be_apart(tmp_path: Path) -> None:
    model = write_small(tmp_path / "model", CONFIGS["sdar"])
    with pytest.raises(ConfigError, match="apart"):
        run(ExportConfig(path=str(model), out=model / "inner"))
    run(ExportConfig(path=str(model), out=tmp_path / "out", name="Small"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("Unknown") == 2
    assert "# Small\n" in card
    assert "license:" not in card


def test_the_card_names_a_distillation_and_its_pool(tmp_path: Path) -> None:
    folder = tmp_path / "distilled"
    shutil.copytree(embedded_model(), folder / "model")
    (folder / "config.yaml").write_text(render_config(DistillConfig(steps=9, seed=4)))
    run(ExportConfig(path=str(folder), out=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "1. **distill**: 9 steps of 32 orders of opening, the likeliest 25% of 8 for each of 1024 texts; seed 4"
        in card
    )
    assert "generated pairs of Fewstep's embedded family" in card
    assert "list functions; it says nothing of other tasks" in card
