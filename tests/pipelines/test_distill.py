"""Constrained-order training: the pool's orders and scores by their definition, transitions, and an interrupted job."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.small_checkpoints import CONFIGS, MASK, write_small

from fewstep.actors.verifier import LocalVerifier
from fewstep.cluster.session import ray_session
from fewstep.kernels.attention import visibility
from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.kernels.rows import NO_TARGET
from fewstep.pipelines.corruption import Sample
from fewstep.pipelines.distill import find_teacher, run, specification_of, transition
from fewstep.pipelines.distill_settings import DistillConfig, PoolConfig
from fewstep.pipelines.free_orders import FreeOrders
from fewstep.pipelines.order_pool import Order, best_orders, draw_orders, fill_pool, read_pool
from fewstep.platform.errors import ConfigError
from fewstep.platform.rng import generator

TEXT = Sample(np.array([7, 3, 90, 14, 22, 63, 55, 8, 21, 40, 41, 17, 30, 31, 32, 33]), 5)
POOL = PoolConfig(num_samples=3, num_orders=4, temperature=1.0, threshold=0.9, keep_share=0.5)


def small(name: str, folder: Path) -> Transformer:
    model, _ = load_model(write_small(folder, CONFIGS[name]))
    with torch.no_grad():  # sharper, so that several positions pass the threshold
        model.head_weight.mul_(8.0)
    return model


def plain_score(model: Transformer, order: Order) -> float:
    """The path bound by its definition: block by block, one whole forward a step, clean tokens before the block."""
    size, total, count = model.config.block_size, 0.0, 0
    positions = torch.arange(len(order.tokens))[None]
    attention = masked_attention(visibility(positions, torch.zeros_like(positions), size))
    for first in range(order.num_prompt // size * size, len(order.tokens), size):
        own = np.arange(first, first + size)
        for step in range(int(order.step[own].max()) + 1):
            tokens = order.tokens.copy()
            tokens[own[order.step[own] >= step]] = MASK
            with torch.no_grad():
                logits = model.logits(model(torch.from_numpy(tokens)[None], positions, attention))[0]
            for position in own[order.step[own] == step]:
                row = position - 1 if model.config.logit_shift else position
                total += float(logits[row].log_softmax(-1)[order.tokens[position]])
                count += 1
    return total / count


@pytest.mark.parametrize("name", ["sdar", "fast_dllm_v2"])
def test_scores_are_the_path_bound_and_every_position_opens_once(name: str, tmp_path: Path) -> None:
    model = small(name, tmp_path)
    orders = draw_orders(model, TEXT, 0, POOL, 7)
    assert len({order.step.tobytes() for order in orders}) > 1
    for order in orders:
        assert order.score == pytest.approx(plain_score(model, order), rel=1e-4)
        assert (order.step[: TEXT.num_prompt] == -1).all()
        size = model.config.block_size
        for first in range(TEXT.num_prompt // size * size, len(TEXT.tokens), size):
            opened = order.step[first : first + size]
            opened = opened[opened >= 0]
            assert set(opened) == set(range(int(opened.max()) + 1)), "a step that opens nothing"
    again = draw_orders(model, TEXT, 0, POOL, 7)
    assert all((one.step == two.step).all() for one, two in zip(orders, again, strict=True))


def test_without_noise_and_at_threshold_one_there_is_one_order_of_one_token_a_step(tmp_path: Path) -> None:
    model = small("sdar", tmp_path)
    one = POOL.model_copy(update={"temperature": 0.0, "threshold": 1.0})
    orders = draw_orders(model, TEXT, 0, one, 7)
    assert len({order.step.tobytes() for order in orders}) == 1
    assert orders[0].num_steps == model.config.block_size


def test_the_best_are_kept_and_among_equals_the_faster() -> None:
    def order(number: int, score: float, num_steps: int) -> Order:
        return Order(0, number, TEXT.tokens, 5, np.zeros(16, np.int64), score, num_steps)

    orders = [order(0, -2.0, 1), order(1, -1.0, 4), order(2, -1.0, 3), order(3, -3.0, 1)]
    assert [kept.number for kept in best_orders(orders, 0.5)] == [2, 1]
    assert [kept.number for kept in best_orders(orders, 0.01)] == [2]


def test_an_interrupted_pool_is_filled_up_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.pipelines.order_pool.SAMPLES_PER_PART", 1)
    model = small("sdar", tmp_path / "model")

    def candidates(sample: int) -> list[Order]:
        return draw_orders(model, TEXT, sample, POOL, 3)

    fill_pool(tmp_path / "pool", candidates, POOL)
    parts = sorted((tmp_path / "pool").glob("*.parquet"))
    whole = [part.read_bytes() for part in parts]
    parts[1].unlink()
    untouched = parts[0].stat().st_mtime_ns
    fill_pool(tmp_path / "pool", candidates, POOL)
    assert [part.read_bytes() for part in parts] == whole
    assert parts[0].stat().st_mtime_ns == untouched
    kept = read_pool(tmp_path / "pool")
    assert [order.sample for order in kept] == [0, 0, 1, 1, 2, 2]
    assert all((order.tokens == TEXT.tokens).all() for order in kept)


def test_right_answers_of_the_models_own_become_orders(tmp_path: Path) -> None:
    config = DistillConfig(pool=PoolConfig(num_orders=2, num_free=3, free_temperature=0.0))
    teacher = find_teacher(config)
    model, tokenizer = load_model(teacher.folder, torch.float32)
    plain, _ = load_model(teacher.folder, torch.float32)
    with FreeOrders(model, plain, tokenizer, config.pool, 0) as free, LocalVerifier() as verifier:
        tasks = [specification_of(config, number).task() for number in range(6)]
        drawn = [free.draw(task, number) for number, task in enumerate(tasks)]
        wrong = replace(
            tasks[0], check=replace(tasks[0].check, expected=tuple([7] for _ in tasks[0].check.expected))
        )
        assert free.draw(wrong, 0) == []
        assert sum(map(len, drawn)) >= 9
        for task, orders in zip(tasks, drawn, strict=True):
            for order in orders:
                assert order.number >= config.pool.num_orders
                assert len(order.tokens) % teacher.model.block_size == 0
                answer = order.tokens[order.num_prompt :].tolist()
                text = tokenizer.decode(answer[: answer.index(teacher.model.eos_token_id)])
                assert verifier.verify([(task, text)])[0].passed
                assert order.score == pytest.approx(plain_score(plain, order), rel=1e-3)


@pytest.mark.parametrize("corrupt_share", [0.0, 1.0])
def test_a_transition_shows_what_was_open_and_asks_for_what_opens_next(
    corrupt_share: float, tmp_path: Path
) -> None:
    config = small("sdar", tmp_path).config
    step = np.array([-1, -1, -1, -1, -1, 0, 2, 1, 3, 2, 1, 0, 0, 0, 1, 1])
    order = Order(0, 0, TEXT.tokens, 5, step, -1.0, 4)
    jumps = set()
    for key in range(60):
        rows = transition(order, config, np.arange(40, 60), corrupt_share, generator("t", key))
        state = rows.copies == 1
        tokens, targets, weights = rows.tokens[state], rows.targets[state], rows.weights[state]
        for first in range(0, len(tokens), config.block_size):
            own = slice(first, first + config.block_size)
            own_step, clean = step[4:][own], TEXT.tokens[4:][own]
            masked = tokens[own] == MASK
            learned = masked & (targets[own] != NO_TARGET)
            assert learned.any()
            begin, end = own_step[masked].min(), own_step[learned].max() + 1
            assert (masked == (own_step >= begin)).all()
            assert (learned == ((own_step >= begin) & (own_step < end))).all()
            assert (targets[own][learned] == clean[learned]).all()
            np.testing.assert_allclose(weights[own][learned], 1 / masked.sum())
            visible = ~masked & (own_step >= 0)
            if corrupt_share:
                assert (targets[own][visible] == clean[visible]).all()
            else:
                assert (tokens[own][~masked] == clean[~masked]).all()
                assert (targets[own][~masked] == NO_TARGET).all()
            jumps.add((int(begin), int(end)))
    assert {(0, 1), (0, 4), (2, 3)} <= jumps


def test_a_bidirectional_model_and_foreign_data_are_refused(tmp_path: Path) -> None:
    write_small(tmp_path / "dream", CONFIGS["dream"])
    write_small(tmp_path / "sdar", CONFIGS["sdar"])
    with pytest.raises(ConfigError, match="block-causal"):
        run(DistillConfig(model=str(tmp_path / "dream"), out=tmp_path / "out"))
    with pytest.raises(ConfigError, match="fewstep prepare"):
        run(DistillConfig(model=str(tmp_path / "sdar"), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_an_interrupted_job_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    config = DistillConfig.model_validate(
        {"out": tmp_path / "run", "pool": {"num_samples": 4, "num_orders": 2, "num_free": 1}, "steps": 4, "batch_size": 2,
         "checkpoint_every": 2, "warmup_steps": 1, "decay_share": 0.0, "trainer": {"precision": "fp32"}}
    )  # fmt: skip
    with ray_session(num_cpus=1):
        run(config)
        whole, _ = load_model(config.out / "model")
        shutil.rmtree(config.out / "model")
        run(config)
    resumed, _ = load_model(config.out / "model")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    with pytest.raises(ConfigError, match="other data"):
        run(config.model_copy(update={"seed": 1}))
