"""The curriculum's plan, and a run that is interrupted and taken up again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.rows import NO_TARGET
from fewstep.pipelines.curriculum import FamilyBatches, plan_step
from fewstep.pipelines.objectives.denoise import LEVELS
from fewstep.pipelines.pretrain import run
from fewstep.pipelines.pretrain_start import find_start
from fewstep.pipelines.settings import ModelSize, Phase, PretrainConfig
from fewstep.platform.errors import ConfigError

SMALL = PretrainConfig(
    steps=6,
    batch_size=4,
    checkpoint_every=3,
    warmup_steps=2,
    phases=(Phase(block_size=1, share=0.5), Phase(block_size=8, share=0.5)),
    size=ModelSize(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                    intermediate_size=48, max_position_embeddings=128, block_size=8),
    trainer={"ema_decay": 0.9, "zero_stage": 2},
)  # fmt: skip


def family_batches(config: PretrainConfig) -> FamilyBatches:
    start = find_start(config, None)
    return FamilyBatches(config, start.model, start.tokenizer)


def test_block_sizes_follow_the_phases_and_edits_come_last() -> None:
    config = PretrainConfig(steps=1000)
    plans = [plan_step(config, step) for step in range(1000)]
    sizes = [plan.block_size for plan in plans]
    assert sizes == sorted(sizes)
    assert [sizes.count(size) for size in (1, 2, 4, 8, 16)] == [300, 50, 80, 120, 450]
    assert [plan.edits for plan in plans] == [False] * 800 + [True] * 200


def test_rate_warms_up_holds_and_falls_to_zero() -> None:
    config = PretrainConfig(steps=1000, learning_rate=1.0, warmup_steps=100, decay_share=0.35)
    rates = [plan_step(config, step).learning_rate for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[300] == 1.0
    assert rates[-1] == pytest.approx(0.001 / 0.35)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    batches = family_batches(SMALL)
    one, two = batches.draw(4), family_batches(SMALL).draw(4)
    assert all((a.tokens == b.tokens).all() for a, b in zip(one, two, strict=True))
    other = batches.draw(5)
    assert any(
        a.tokens.shape != b.tokens.shape or (a.tokens != b.tokens).any()
        for a, b in zip(one, other, strict=True)
    )


def test_edits_add_a_state_without_masks() -> None:
    config = SMALL.model_copy(update={"edit_share": 0.5})
    model = find_start(config, None).model
    early, late = (family_batches(config).draw(step) for step in (2, 5))
    assert {sample.copies.max() for sample in early} == {1}
    for sample in late:
        last = sample.copies == sample.copies.max()
        assert not (sample.tokens[last] == model.mask_token_id).any()
        assert (sample.targets[last] != NO_TARGET).any()


@pytest.mark.ray
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of step 3 is left by the first run; a second start must go on from it, bit for bit, and a third one
    with two ranks instead of one as nearly as sums in another order allow."""
    config = SMALL.model_copy(update={"out": tmp_path / "run"})
    with ray_session(num_cpus=2):
        run(config)
        whole, _ = load_model(config.out / "model")
        shutil.rmtree(config.out / "model")
        run(config)
        resumed, _ = load_model(config.out / "model")
        with pytest.raises(ConfigError, match="another configuration"):
            run(config.model_copy(update={"batch_size": 5}))
        shutil.rmtree(config.out / "model")
        capsys.readouterr()
        run(config.model_copy(update={"trainer": config.trainer.model_copy(update={"num_ranks": 2})}))
        said = capsys.readouterr().out
        by_two, _ = load_model(config.out / "model")
        rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
        # Who starts over and ends before a checkpoint of this run's is due leaves none of another's.
        run(config.model_copy(update={"batch_size": 5, "steps": 2, "resume": False}))
    assert not (config.out / "checkpoint").exists()
    assert "checkpoint of 1 trainer ranks, converted for 2\nresumed at step 3\n" in said
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
        torch.testing.assert_close(by_two.state_dict()[name], tensor, atol=1e-4, rtol=0, msg=name)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # The last step is an edited one; its levels are what the whole is made of.
    levels = {name: rows[-1][f"nll_{name}"] for name in LEVELS if f"nll_{name}" in rows[-1]}
    assert "edit" in levels
    assert len(levels) > 2
    assert min(levels.values()) <= rows[-1]["nll_per_token"] <= max(levels.values())
    assert rows[-1]["rows_per_second"] > 0
    assert 0 < rows[-1]["mfu"] < 1
