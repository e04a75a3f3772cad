"""An engine over a model of several ranks does what it does over the same model in one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.small_checkpoints import CONFIGS, write_small
from tests.actors.engine.reference.models import VERSION, build_model, build_tokenizer, token_bytes
from tests.actors.engine.sharded_ranks import Group, open_ranks

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request, Update
from fewstep.actors.engine.sharded_model import TRIAL, drop, load_sharded, staged
from fewstep.kernels.model.checkpoint import load_model, load_state, load_tokenizer, save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.sharding import Shard, is_summand_bias, require_shardable, split_axis
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import ActorDied, CheckpointError, ConfigError
from fewstep.platform.records import DecodePolicy, Trajectory, WeightVersion

FAMILIES = ("sdar", "llada", "dream", "fast_dllm_v2", "llada2", "stable_diffcoder")


@pytest.fixture(scope="module")
def two() -> Iterator[Group]:
    with open_ranks(2) as group:
        yield group


def folder_of(path: Path, kind: str = "block_causal", seed: int = 0) -> Path:
    model = build_model(seed, kind)  # type: ignore[arg-type]
    save_model(path, model.state_dict(), model.config, build_tokenizer())
    return path


def both(folder: Path, group: Group, dtype: torch.dtype | None = None, **settings: Any) -> list[Engine]:
    """The same engine over one process and over the group."""
    model, tokenizer = load_model(folder, dtype)
    sharded = load_sharded(group.ranks, folder, dtype).model
    common = {"max_sequences": 8, "weight_version": VERSION, **settings}
    budget = common.pop("memory_bytes", None)
    # A rank's page has half of the heads, so half of the bytes are as many pages.
    half = None if budget is None else budget // 2
    return [
        Engine(model, tokenizer, memory_bytes=budget, **common),
        Engine(sharded, tokenizer, memory_bytes=half, **common),
    ]


def requests_of(count: int, size: int = 8, **policy: Any) -> list[Request]:
    generator = np.random.default_rng(5)
    return [
        Request(
            f"r{index}",
            tuple(int(token) for token in generator.integers(3, 33, int(generator.integers(1, 25)))),
            DecodePolicy(seed=index, **policy),
            max_tokens=int(generator.integers(4, 30)),
        )
        for index in range(count)
    ]


def assert_same(one: list[Trajectory], other: list[Trajectory]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.canvas_ids.tolist() == b.canvas_ids.tolist()
        assert a.step_map.tolist() == b.step_map.tolist()
        assert (a.finish_reason, a.num_tokens, a.forwards) == (b.finish_reason, b.num_tokens, b.forwards)
        np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-4)


def counts(engine: Engine) -> dict[str, float]:
    own = ("page_bytes", "cache_drift", "step_s")
    return {name: value for name, value in engine.stats().items() if name not in own}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["block_causal", "bidirectional"])
def test_tokens_and_counts_are_those_of_one_rank(
    kind: str, temperature: float, tmp_path: Path, two: Group
) -> None:
    one, other = both(folder_of(tmp_path / "m", kind), two)
    requests = requests_of(12, temperature=temperature)
    assert_same(one.generate(requests), other.generate(requests))
    assert counts(one) == counts(other)
    assert 2 * other.stats()["page_bytes"] == one.stats()["page_bytes"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_that_is_served_is_served_by_two_ranks(name: str, tmp_path: Path, two: Group) -> None:
    folder = write_small(tmp_path / name, CONFIGS[name])
    one, other = both(folder, two)
    requests = [
        Request(f"r{i}", (7, 3, 90, 14 + i), DecodePolicy(block_size=4 if ("lla" in name and name != "llada2") or name == "dream" else None), max_tokens=13, ignore_eos=True)
        for i in range(3)
    ]  # fmt: skip
    assert_same(one.generate(requests), other.generate(requests))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_an_approximate_cache_drifts_alike(cache: str, tmp_path: Path, two: Group) -> None:
    one, other = both(folder_of(tmp_path / "m", "bidirectional"), two)
    requests = requests_of(5, cache=cache, refresh_every=2)
    assert_same(one.generate(requests), other.generate(requests))
    assert one.stats()["cache_drift"] > 0
    assert other.stats()["cache_drift"] == pytest.approx(one.stats()["cache_drift"], rel=1e-3)


def test_blocks_that_somebody_has_computed_are_found_on_every_rank(tmp_path: Path, two: Group) -> None:
    one, other = both(folder_of(tmp_path / "m"), two)
    prompt = (*range(3, 33), 3, 4)
    for engine in (one, other):
        engine.generate([Request("a", prompt, DecodePolicy(), max_tokens=16)])
    again = [Request(f"b{i}", (*prompt, 5 + i), DecodePolicy(seed=i), max_tokens=16) for i in range(3)]
    assert_same(one.generate(again), other.generate(again))
    assert counts(one) == counts(other)
    assert other.stats()["prefix_hits"] >= 4 * 3


def test_without_room_for_all_the_youngest_give_way_alike(tmp_path: Path, two: Group) -> None:
    folder = folder_of(tmp_path / "m")
    budget = int(1.5 * 64 * token_bytes(ModelConfig.load(folder)))
    one, other = both(folder, two, memory_bytes=budget, prefix_cache=False)
    requests = [
        Request(f"r{i}", tuple(range(3, 20 + i)), DecodePolicy(seed=i), max_tokens=24, ignore_eos=True)
        for i in range(6)
    ]
    assert_same(one.generate(requests), other.generate(requests))
    assert counts(one) == counts(other)
    assert other.stats()["preemptions"] > 0


def test_an_abort_in_the_middle_leaves_the_others_as_they_were(tmp_path: Path, two: Group) -> None:
    ended: list[dict[str, Trajectory]] = []
    for engine in both(folder_of(tmp_path / "m"), two):
        for request in requests_of(6):
            engine.add(request)
        updates: list[Update] = []
        for step in range(200):
            if step == 3:
                engine.abort("r2")
            if not engine.has_work:
                break
            updates += engine.step()
        ended.append({u.request_id: u.trajectory for u in updates if u.trajectory is not None})
        assert engine.stats()["slots_free"] == 8
    assert ended[0].keys() == ended[1].keys() == {f"r{i}" for i in (0, 1, 3, 4, 5)}
    assert_same(list(ended[0].values()), [ended[1][name] for name in ended[0]])


def test_a_poisoned_request_fails_alone_on_every_rank(tmp_path: Path, two: Group) -> None:
    source = write_small(tmp_path / "source", CONFIGS["llada"])
    config = ModelConfig.load(source)
    state = load_state(source, config)
    state["embed_tokens.weight"][90] = torch.nan
    state["lm_head.weight"][90] = 0  # never the likeliest, so nobody writes it
    save_model(tmp_path / "m", state, config, load_tokenizer(source, config), source=source)
    # Room for one request: the next one gets the pages that were poisoned, and does not fill the last one.
    budget = config.max_position_embeddings * token_bytes(config)
    engines = both(tmp_path / "m", two, memory_bytes=budget, prefix_cache=False)
    policy = DecodePolicy(cache="prefix", block_size=4)
    good = Request("good", tuple(range(10, 25)), policy, max_tokens=100, ignore_eos=True)
    answers = []
    for engine in engines:
        engine.add(Request("bad", (*range(10, 80), 90, *range(10, 50)), policy, max_tokens=16))
        while engine.has_work:
            last = engine.step()
        assert last[-1].error
        answers += engine.generate([good])
    assert_same(answers[:1], answers[1:])


def test_weights_change_on_every_rank_between_two_steps(tmp_path: Path, two: Group) -> None:
    folder, new = folder_of(tmp_path / "old"), folder_of(tmp_path / "new", seed=1)
    one, other = both(folder, two)
    version, request = WeightVersion("test", 1, "1"), requests_of(4)
    for engine in (one, other):
        for item in request:
            engine.add(item)
        for _ in range(4):
            engine.step()
    trial = load_sharded(two.ranks, new, number=TRIAL).model
    one.load_weights(load_state(new, one.config), version)
    other.load_weights(staged(trial), version)
    ended = []
    for engine in (one, other):
        last: dict[str, Trajectory] = {}
        while engine.has_work:
            last |= {u.request_id: u.trajectory for u in engine.step() if u.trajectory is not None}
        ended.append([last[name] for name in sorted(last)])
    assert_same(*ended)
    assert_same(one.generate(requests_of(6)), other.generate(requests_of(6)))


def test_weights_on_trial_run_beside_those_that_serve(tmp_path: Path, two: Group) -> None:
    one, other = both(folder_of(tmp_path / "old"), two)
    new = folder_of(tmp_path / "new", seed=1)
    for engine in (one, other):
        engine.add(requests_of(1)[0])
        engine.step()
    trial = load_sharded(two.ranks, new, number=TRIAL).model
    model, tokenizer = load_model(new)
    trials = [
        Engine(weights, tokenizer, max_sequences=1, weight_version=VERSION) for weights in (model, trial)
    ]
    assert_same(*(engine.generate(requests_of(3)) for engine in trials))
    ends = [[], []]  # type: ignore[var-annotated]
    for engine, end in zip((one, other), ends, strict=True):
        while engine.has_work:
            end += [u.trajectory for u in engine.step() if u.trajectory is not None]
    assert_same(*ends)


def test_weights_of_one_process_are_refused(tmp_path: Path, two: Group) -> None:
    folder = folder_of(tmp_path / "m")
    _, other = both(folder, two)
    with pytest.raises(CheckpointError, match="staged on every rank"):
        other.load_weights(load_state(folder, ModelConfig.load(folder)), VERSION)


def test_staged_weights_that_do_not_fit_are_refused_before_any_rank_takes_them(
    tmp_path: Path, two: Group
) -> None:
    _, other = both(folder_of(tmp_path / "old"), two)
    before = other.generate(requests_of(2))
    state = staged(load_sharded(two.ranks, folder_of(tmp_path / "new", seed=1), number=TRIAL).model)
    state["norm.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"^weights test:1:1: got a different norm\.weight"):
        other.load_weights(state, WeightVersion("test", 1, "1"))
    drop(two.ranks, TRIAL)
    assert_same(before, other.generate(requests_of(2)))


def fail_behind_an_order(group: Group) -> None:
    with group.ranks.turn():
        drop(group.ranks, TRIAL)
        raise MemoryError("no room for a layer")


def test_an_error_behind_an_order_loses_the_group_at_once_and_names_itself(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    with open_ranks(2) as group:
        _, tokenizer = load_model(folder)
        engine = Engine(
            load_sharded(group.ranks, folder).model, tokenizer, max_sequences=2, weight_version=VERSION
        )
        with pytest.raises(MemoryError), group.ranks.turn():
            raise MemoryError("before anything was ordered")
        engine.generate(requests_of(1))
        with pytest.raises(MemoryError):
            fail_behind_an_order(group)
        with pytest.raises(ActorDied, match=r"^rank 0 of 2 died: MemoryError: no room for a layer$"):
            engine.generate(requests_of(2))
        group.processes[0].kill()  # a rank waits for orders for as long as rank 0's process lives


def test_a_folder_that_a_rank_cannot_read_is_refused_by_that_rank(tmp_path: Path, two: Group) -> None:
    folder = folder_of(tmp_path / "m")
    _, tokenizer = load_model(folder)
    weights = load_sharded(two.ranks, folder).model
    engine = Engine(weights, tokenizer, max_sequences=2, weight_version=VERSION)
    before = engine.generate(requests_of(2))
    broken = folder_of(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_sharded(two.ranks, broken, number=TRIAL)
    assert_same(before, engine.generate(requests_of(2)))


def test_three_ranks_and_a_dead_one_is_named(tmp_path: Path) -> None:
    config = ModelConfig.load(folder_of(tmp_path / "source")).model_copy(
        update={"num_attention_heads": 6, "num_key_value_heads": 3}
    )
    model = Transformer(config)
    model.initialise(3)
    save_model(tmp_path / "m", model.state_dict(), config, build_tokenizer())
    with open_ranks(3, deadline_s=20) as group:
        weights = load_sharded(group.ranks, tmp_path / "m").model
        _, tokenizer = load_model(tmp_path / "m")
        one = Engine(model, tokenizer, max_sequences=4, weight_version=VERSION)
        other = Engine(weights, tokenizer, max_sequences=4, weight_version=VERSION)
        assert_same(one.generate(requests_of(5)), other.generate(requests_of(5)))
        pid = group.processes[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ActorDied, match=r"^rank 2 of 3 died: .*(closed|reset) by"):
            other.generate(requests_of(2))
        with pytest.raises(ActorDied, match=r"^rank 2 of 3"):
            other.step()


def test_a_rank_that_hangs_is_lost_within_the_deadline(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    with open_ranks(2, deadline_s=2) as group:
        _, tokenizer = load_model(folder)
        engine = Engine(
            load_sharded(group.ranks, folder).model, tokenizer, max_sequences=2, weight_version=VERSION
        )
        pid = group.processes[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ActorDied, match="rank 1 of 2"):
            engine.generate(requests_of(1))
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_make_the_checkpoint_again(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_small(tmp_path / name, CONFIGS[name], dtype=dtype)
    config = ModelConfig.load(folder)
    whole = load_state(folder, config)
    parts = [load_state(folder, config, shard=Shard(rank, 2)) for rank in range(2)]
    assert parts[0].keys() == whole.keys()
    assert parts[1].keys() == {name for name in whole if name.startswith("layers.")}
    for key, tensor in whole.items():
        own = [part[key] for part in parts if key in part]
        axis = split_axis(key)
        if axis is not None:
            assert torch.equal(torch.cat(own, axis), tensor)
        elif is_summand_bias(key):
            assert torch.equal(own[0] + own[1], tensor)
            assert not own[1].any()
        else:
            assert all(torch.equal(part, tensor) for part in own)


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused(tmp_path: Path) -> None:
    config = ModelConfig.load(folder_of(tmp_path / "m"))
    with pytest.raises(ConfigError, match=r"tensor_parallel: got 4.*num_key_value_heads of 2; allowed: 1, 2"):
        require_shardable(config, 4)
