"""The replica pool on a real local Ray: equal answers whatever the split, and whatever dies on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.fleet import State
from fewstep.actors.replica import ReplicaSettings
from fewstep.actors.replica_pool import ReplicaPool
from fewstep.actors.weight_sync.base import ChecksumMismatch, Echo, Payload, Receiver
from fewstep.actors.weight_sync.shared_memory import SharedMemoryTransport
from fewstep.cluster.session import ray_session
from fewstep.kernels.model.checkpoint import load_model, load_state, save_model, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import ActorDied, CheckpointError, RequestError, ResourceError
from fewstep.platform.records import DecodePolicy, Trajectory, WeightVersion

pytestmark = pytest.mark.ray

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=128,
    max_position_embeddings=256,
    block_size=8,
    mask_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
QUICK = ReplicaSettings(min_chunk=4, heartbeat_s=0.5)


def weights(seed: int) -> dict[str, torch.Tensor]:
    model = Transformer(CONFIG)
    model.initialise(seed)
    state = model.state_dict()
    # Logits spread far apart: no two candidates so close that the rounding of another batch shape swaps them.
    state["embed_tokens.weight"] *= 20
    return state


def version_of(state: dict[str, torch.Tensor], step: int) -> WeightVersion:
    return WeightVersion("test", step, state_checksum(state))


def requests(count: int, max_tokens: int = 96) -> list[Request]:
    # Of 17 keys this one's closest call in ranking is the clearest, 1.2e-5 of the confidence: rounding, which another
    # batch shape or alignment changes, is about 1e-6.
    draws = np.random.Generator(np.random.Philox(22))
    return [
        Request(
            f"r{index}",
            tuple(int(token) for token in draws.integers(3, 64, size=int(draws.integers(2, 20)))),
            DecodePolicy(kind="static", tokens_per_step=1, seed=index, temperature=0.7 * (index % 2)),
            max_tokens=max_tokens,
        )
        for index in range(count)
    ]


def assert_same(got: Sequence[Trajectory], expected: Sequence[Trajectory]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.prompt_ids, other.prompt_ids)
        np.testing.assert_array_equal(one.canvas_ids, other.canvas_ids)
        np.testing.assert_array_equal(one.step_map, other.step_map)
        np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-4)
        assert (one.num_tokens, one.finish_reason) == (other.num_tokens, other.finish_reason)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(4):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = {"<|mask|>": 0, "<|eos|>": 1, "<|pad|>": 2} | {f"w{index}": index for index in range(3, 64)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|pad|>"))
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, weights(0), CONFIG, tokenizer)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, list[Trajectory]]:
    """What one engine in this process answers, by weight seed."""
    answers = {}
    for seed in (0, 1):
        model, tokenizer = load_model(folder)
        state = weights(seed)
        model.load_state_dict(state)
        engine = Engine(model, tokenizer, weight_version=version_of(state, seed))
        answers[seed] = engine.generate(requests(48))
    return answers


@pytest.fixture
def pool(session: None, folder: Path) -> Iterator[ReplicaPool]:
    with ReplicaPool(folder, 2, run_id="test", settings=QUICK) as pool:
        yield pool


def when_working(pool: ReplicaPool, name: str, number: signal.Signals) -> threading.Thread:
    """Send a signal to a replica once it has run some forwards of the coming generate."""
    pid = pool.stats()[name].pid

    def strike() -> None:
        spent = cpu_seconds(pid)
        while cpu_seconds(pid) < spent + 0.1:
            time.sleep(0.005)
        os.kill(pid, number)

    thread = threading.Thread(target=strike)
    thread.start()
    return thread


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_answers_and_pushes(pool: ReplicaPool, expected: dict[int, list[Trajectory]]) -> None:
    assert_same(pool.generate(requests(48)), expected[0])
    assert pool.generate([]) == []
    shares = [stats.committed_tokens for stats in pool.stats().values()]
    assert min(shares) > 0.1 * sum(shares)  # both worked

    state = weights(1)
    version = version_of(state, 1)
    receipt = pool.push(state, version)
    assert receipt.failures == {}
    assert list(receipt.echoes.values()) == [Echo(version, version.checksum)] * 2
    assert (receipt.transport, receipt.num_calls) == ("shared_memory", 2)
    got = pool.generate(requests(48))
    assert_same(got, expected[1])
    assert {trajectory.weight_version_first for trajectory in got} == {str(version)}


def test_a_bad_request_is_refused_before_any_starts(pool: ReplicaPool) -> None:
    before = {name: stats.forwards for name, stats in pool.stats().items()}
    good, bad = requests(2), Request("bad", (0,), DecodePolicy())
    with pytest.raises(RequestError, match="mask token"):
        pool.generate([*good, bad])
    with pytest.raises(RequestError, match="request_id"):
        pool.generate([good[0], good[0]])
    assert {name: stats.forwards for name, stats in pool.stats().items()} == before


def test_a_request_that_fails_in_its_replica_is_named_and_the_pool_goes_on(
    pool: ReplicaPool, expected: dict[int, list[Trajectory]]
) -> None:
    broken = {name: tensor * float("nan") for name, tensor in weights(0).items()}
    pool.push(broken, version_of(broken, 1))
    with pytest.raises(RequestError, match="not finite"):
        pool.generate(requests(8))
    state = weights(0)
    pool.push(state, version_of(state, 2))
    assert_same(pool.generate(requests(48)), expected[0])


def test_kill_9_in_the_middle_of_generate(
    pool: ReplicaPool, expected: dict[int, list[Trajectory]], caplog: pytest.LogCaptureFixture
) -> None:
    strike = when_working(pool, "replica-0", signal.SIGKILL)
    got = pool.generate(requests(48))
    strike.join()
    assert_same(got, expected[0])
    assert pool.fleet.members["replica-0"].restarts == 1
    assert any("replica-0" in line and "died" in line for line in caplog.messages)

    pool.wait_started()
    assert pool.fleet.state("replica-0") is State.STALE
    # The next call first brings it the weights that serve; only then is it given work.
    assert_same(pool.generate(requests(48)), expected[0])
    assert pool.fleet.state("replica-0") is State.HEALTHY
    assert pool.stats()["replica-0"].forwards > 0

    state = weights(1)
    receipt = pool.push(state, version_of(state, 1))
    assert sorted(receipt.echoes) == ["replica-0", "replica-1"]
    assert_same(pool.generate(requests(48)), expected[1])
    assert pool.stats()["replica-0"].forwards > 0


def test_when_everyone_is_killed_the_pushed_weights_come_back(
    pool: ReplicaPool, expected: dict[int, list[Trajectory]]
) -> None:
    state = weights(1)
    pool.push(state, version_of(state, 1))
    strikes = [when_working(pool, name, signal.SIGKILL) for name in ("replica-0", "replica-1")]
    got = pool.generate(requests(48))
    for strike in strikes:
        strike.join()
    assert_same(got, expected[1])  # not step 0, which the replacements loaded
    assert [member.restarts for member in pool.fleet.members.values()] == [1, 1]


def test_a_hung_replica_is_killed_and_its_work_done_elsewhere(
    session: None, folder: Path, expected: dict[int, list[Trajectory]]
) -> None:
    settings = ReplicaSettings(min_chunk=4, heartbeat_s=0.5, suspect_after_s=2, dead_after_s=6)
    with ReplicaPool(folder, 2, run_id="test", settings=settings) as pool:
        strike = when_working(pool, "replica-1", signal.SIGSTOP)
        got = pool.generate(requests(48))
        strike.join()
        assert_same(got, expected[0])
        assert pool.fleet.members["replica-1"].restarts == 1
        assert "no sign of life" in pool.fleet.members["replica-1"].cause


def test_a_dead_replica_never_holds_up_a_push(pool: ReplicaPool) -> None:
    os.kill(pool.stats()["replica-1"].pid, signal.SIGKILL)
    state = weights(1)
    receipt = pool.push(state, version_of(state, 1))
    assert list(receipt.echoes) == ["replica-0"]
    assert list(receipt.failures) == ["replica-1"]
    assert receipt.seconds < 10
    assert pool.fleet.state("replica-1") is State.RESTARTING


class TamperedPool(ReplicaPool):
    """replica-1 receives other bytes than were sent, as after a broken transport."""

    wrong: Payload | None = None

    def _receiver(self, name: str) -> Receiver:
        real = super()._receiver(name)
        wrong = self.wrong
        return real if wrong is None or name != "replica-1" else lambda _, version: real(wrong, version)


def test_a_replica_that_fails_the_checksum_does_not_serve(
    session: None, folder: Path, expected: dict[int, list[Trajectory]]
) -> None:
    with TamperedPool(folder, 2, run_id="test", settings=QUICK) as pool, ExitStack() as stack:
        bent = weights(1)
        bent["norm.weight"][0] += 1e-6
        pool.wrong = stack.enter_context(SharedMemoryTransport().publish(bent, 1, 60.0))
        receipt = pool.push(weights(1), version_of(weights(1), 1))
        assert list(receipt.echoes) == ["replica-0"]
        assert isinstance(receipt.failures["replica-1"], ChecksumMismatch)
        assert pool.fleet.state("replica-1") is State.STALE
        forwards = pool.stats()["replica-1"].forwards
        assert_same(pool.generate(requests(48)), expected[1])
        assert pool.stats()["replica-1"].forwards == forwards
        pool.wrong = None
        assert pool.push(weights(1), version_of(weights(1), 2)).failures == {}
        assert pool.fleet.state("replica-1") is State.HEALTHY


def test_when_no_replica_proves_the_weights_generate_says_so(pool: ReplicaPool) -> None:
    pool.push(weights(1), version_of(weights(0), 1))
    with pytest.raises(ActorDied, match=r"every replica died: .*sent test:1"):
        pool.generate(requests(2))


def test_the_object_store_transport(
    session: None, folder: Path, expected: dict[int, list[Trajectory]]
) -> None:
    settings = ReplicaSettings(transport="object_store")
    with ReplicaPool(folder, 1, run_id="test", settings=settings) as pool:
        state = weights(1)
        receipt = pool.push(state, version_of(state, 1))
        assert (receipt.transport, receipt.failures) == ("object_store", {})
        assert_same(pool.generate(requests(48)), expected[1])


def test_a_broadcast_goes_on_without_the_dead_and_takes_the_replacement_in(
    session: None, folder: Path, expected: dict[int, list[Trajectory]]
) -> None:
    settings = ReplicaSettings(transport="broadcast", min_chunk=4, num_cpus=0.5)
    with ReplicaPool(folder, 2, run_id="test", settings=settings) as pool:
        state = weights(1)
        receipt = pool.push(state, version_of(state, 1))
        assert (receipt.transport, receipt.num_calls, receipt.failures) == ("broadcast", 2, {})
        assert_same(pool.generate(requests(48)), expected[1])
        os.kill(pool.stats()["replica-1"].pid, signal.SIGKILL)
        receipt = pool.push(state, version_of(state, 2))
        assert list(receipt.echoes) == ["replica-0"]
        assert list(receipt.failures) == ["replica-1"]
        assert receipt.seconds < settings.push_deadline_s / 2
        pool.wait_started()
        receipt = pool.push(state, version_of(state, 3))
        assert sorted(receipt.echoes) == ["replica-0", "replica-1"]
        assert_same(pool.generate(requests(48)), expected[1])


def test_what_cannot_start_is_said_before_anything_starts(
    session: None, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match=r"replicas: got 9 x 1 CPU; allowed: at most"):
        ReplicaPool(folder, 9, run_id="test")
    with pytest.raises(CheckpointError, match="no such file"):
        ReplicaPool(tmp_path, 1, run_id="test")


def test_a_replica_that_cannot_start_is_retired_with_its_cause(
    session: None, folder: Path, tmp_path: Path
) -> None:
    """The folder breaks after the driver's own check: every start fails, so the pool gives up and says why."""
    settings = ReplicaSettings(max_restarts=1)

    class Vanishing(ReplicaPool):
        def _spawn(self, name: str) -> None:
            self.model_folder = tmp_path
            super()._spawn(name)

    with pytest.raises(ActorDied, match=r"every replica died: .*no such file"):
        Vanishing(folder, 1, run_id="test", settings=settings)


def test_the_folders_weights_are_step_0(pool: ReplicaPool, folder: Path) -> None:
    assert pool.version == WeightVersion("test", 0, state_checksum(load_state(folder, CONFIG)))
