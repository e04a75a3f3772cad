"""Jobs that train an adapter: what they leave, and that a merge of it gives the model they wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.small_checkpoints import CONFIGS, write_small
from safetensors.torch import load_file

from fewstep.__main__ import main
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_header, save_adapter
from fewstep.kernels.model.checkpoint import embedded_model, load_model, load_state
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.lora import Lora
from fewstep.kernels.model.lora_settings import LoraSettings
from fewstep.pipelines.distill import find_teacher
from fewstep.pipelines.distill_settings import DistillConfig
from fewstep.pipelines.export import run as export
from fewstep.pipelines.export_settings import ExportConfig
from fewstep.pipelines.pretrain import run as pretrain
from fewstep.pipelines.settings import PretrainConfig
from fewstep.platform.artifacts import weights_digest
from fewstep.platform.errors import CheckpointError, ConfigError
from fewstep.platform.mlflow_store import sqlite_uri

REFINE = [
    "in_process=true", "trainer.num_ranks=1", "trainer.precision=fp32", "prompts_per_step=8", "group_size=2",
    "num_eval_tasks=4", "sweep.thresholds=[0.9]", "sweep.tokens_per_step=[]", "learning_rate=1e-3",
    "steps=2", "out=run",
    "trainer.lora.rank=4", "trainer.lora.target_modules=[q_proj, down_proj]", "held_out_checks.every=1",
    "held_out_checks.num_tasks=2",
]  # fmt: skip


def changed(base: Path, other: Path) -> set[str]:
    """Names of the tensors in which two models differ."""
    config = ModelConfig.load(base)
    one, two = load_state(base, config), load_state(other, config)
    return {name for name in one if not torch.equal(one[name], two[name])}


@pytest.mark.timeout(600)
def test_a_refinement_leaves_an_adapter_that_merged_is_its_model(tmp_path: Path) -> None:
    """Also where the weights of an earlier step looked best on held-out tasks, and are what is published."""
    command = ["-m", "fewstep", "refine", *REFINE, f"tracking_uri={sqlite_uri(tmp_path)}"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    header = read_header(run / "adapter")
    assert (header.rank, header.base, header.base_digest) == (4, "embedded", weights_digest(embedded_model()))
    targets = ("q_proj.weight", "down_proj.weight")
    names = load_model(embedded_model())[0].state_dict()
    assert changed(embedded_model(), run / "model") == {name for name in names if name.endswith(targets)}
    export(ExportConfig(path=str(embedded_model()), adapter=str(run), out=tmp_path / "export"))
    assert changed(run / "model", tmp_path / "export") == set()
    card = (tmp_path / "export" / "README.md").read_text()
    assert "a LoRA adapter of rank 4 on q_proj, down_proj" in card
    assert "rank 4, alpha 16, on down_proj, q_proj is merged into weights of digest" in card


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_pre_training_goes_on_with_its_adapter_where_it_was(tmp_path: Path) -> None:
    """Interrupted or not: the same adapter, bit for bit, dropout and average included."""
    config = PretrainConfig.model_validate(
        {"model": str(embedded_model()), "out": tmp_path / "run", "steps": 4, "batch_size": 4, "checkpoint_every": 2,
         "phases": [{"block_size": 16, "share": 1.0}], "tracking_uri": sqlite_uri(tmp_path), "decay_share": 0.0,
         "trainer": {"ema_decay": 0.9, "lora": {"rank": 2, "dropout": 0.1}}}
    )  # fmt: skip
    adapter, model = config.out / "adapter", config.out / "model"
    with ray_session(num_cpus=1):
        pretrain(config)
        whole = load_file(str(adapter / WEIGHTS_FILE))
        shutil.rmtree(adapter)
        shutil.rmtree(model)
        pretrain(config)  # from the checkpoint of step 2
    again = load_file(str(adapter / WEIGHTS_FILE))
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    names = load_model(embedded_model())[0].state_dict()
    assert changed(embedded_model(), model) == {name for name in names if name.endswith("_proj.weight")}
    export(ExportConfig(path=str(embedded_model()), adapter=str(adapter), out=tmp_path / "export"))
    assert changed(model, tmp_path / "export") == set()


def adapter_of(folder: Path, model: Path, *targets: str) -> Path:
    """An adapter that changes nothing, of a model."""
    config, settings = (
        ModelConfig.load(model),
        LoraSettings(rank=2, target_modules=targets or ("all-linear",)),
    )
    save_adapter(folder, Lora(config, settings).factors(), settings, config, str(model), "")
    return folder


def test_what_cannot_be_trained_is_refused_before_work_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer.lora.target_modules: got 'c_attn'; allowed: all-linear, or of a"
    ):
        find_teacher(DistillConfig.model_validate({"trainer": {"lora": {"target_modules": "c_attn"}}}))
    for command, options, message in (
        ("pretrain", ["trainer.lora.rank=4"], "trainer.lora needs a model"),
        ("refine", ["trainer.lora.rank=0"], "trainer.lora.rank: got 0; allowed: greater than or equal to 1"),
        ("refine", ["trainer.lora.r=8"], "trainer.lora.r: got an unknown key; allowed: alpha, dropout, rank, seed, target_modules"),
        ("distill", ["trainer.lora.dropout=1.0"], "trainer.lora.dropout: got 1.0"),
        ("distill", [f"out={tmp_path}/d", "trainer.lora.target_modules=[lm_head]"],
         "trainer.lora.target_modules: got 'lm_head'; allowed: all-linear, or of a fewstep model down_proj, gate_proj,"),
    ):  # fmt: skip
        assert main([command, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_an_export_merges_and_refuses_an_adapter_of_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_small(tmp_path / "sdar", CONFIGS["sdar"], dtype=torch.bfloat16)
    adapter = adapter_of(tmp_path / "adapter", model)
    export(ExportConfig(path=str(model), adapter=str(adapter), out=tmp_path / "out"))
    for path in model.glob("*.safetensors*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), "nothing was added"
    other = write_small(tmp_path / "llada", CONFIGS["llada"])
    assert main(["export", str(other), "--adapter", str(adapter), "--out", str(tmp_path / "no")]) == 2
    assert "got no module model.layers.0.mlp.down_proj in the llada model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="apart from the model's"):
        export(ExportConfig(path=str(model), adapter=str(adapter), out=adapter / "merged"))
    content = json.loads((adapter / CONFIG_FILE).read_text()) | {"use_dora": True}
    (adapter / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="use_dora: got True"):
        export(ExportConfig(path=str(model), adapter=str(adapter), out=tmp_path / "no"))
