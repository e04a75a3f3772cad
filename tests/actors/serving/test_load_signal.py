"""What an engine has left: laws of the signal, and that it foresees what a real engine then does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.pace import Pace
from fewstep.actors.engine.request import Request
from fewstep.actors.serving.load_signal import Load, load_of, together, wanted_replicas
from fewstep.kernels.model.checkpoint import embedded_model, load_model, state_checksum
from fewstep.pipelines.tasks.family import tasks
from fewstep.platform.records import DecodePolicy, WeightVersion

COUNTS = st.integers(0, 500)
MEASURES = st.fixed_dictionaries(
    {
        "num_running": COUNTS, "num_waiting": COUNTS, "num_slots": st.integers(1, 256),
        "masks_running": st.integers(0, 100_000), "masks_waiting": st.integers(0, 100_000),
        "tokens_per_forward": st.floats(0.1, 64.0), "step_s": st.floats(1e-4, 10.0),
        "answer_tokens": st.floats(1.0, 4096.0), "answer_share": st.floats(0.01, 1.0),
    }
)  # fmt: skip


@given(MEASURES, COUNTS, st.integers(1, 1000))
def test_more_masks_and_more_requests_are_more_work_and_faster_forwards_less(
    measures: dict[str, float], queued: int, more: int
) -> None:
    load = load_of(measures, queued)
    for key in ("masks_running", "masks_waiting"):
        assert load_of({**measures, key: measures[key] + more}, queued).seconds_left > load.seconds_left
    one_more = load_of(measures, queued + 1)
    assert one_more.seconds_left - load.seconds_left == pytest.approx(load.request_s, rel=1e-3, abs=1e-9)
    assert one_more.rows_waiting == load.rows_waiting + 1
    twice = load_of({**measures, "tokens_per_forward": 2 * measures["tokens_per_forward"]}, queued)
    assert twice.forwards_left == pytest.approx(load.forwards_left / 2)
    slower = load_of({**measures, "step_s": 3 * measures["step_s"]}, queued)
    assert slower.forwards_left == load.forwards_left
    assert slower.seconds_left == pytest.approx(3 * load.seconds_left)


@given(MEASURES)
def test_an_engine_without_work_or_without_a_past_is_idle(measures: dict[str, float]) -> None:
    idle = {**measures, "masks_running": 0, "masks_waiting": 0}
    assert load_of(idle).seconds_left == 0.0
    new = {**measures, "tokens_per_forward": 0.0, "step_s": 0.0, "answer_tokens": 0.0, "answer_share": 0.0}
    assert load_of(new, 7).seconds_left == 0.0


@given(st.lists(MEASURES, min_size=1, max_size=4))
def test_engines_of_one_replica_take_turns(found: list[dict[str, float]]) -> None:
    loads = [load_of(measures) for measures in found]
    whole = together(loads)
    assert whole.seconds_left == pytest.approx(sum(load.seconds_left for load in loads))
    assert whole.request_s == max(load.request_s for load in loads)
    assert together([]) == Load()


@given(st.lists(st.floats(0.0, 1e4), max_size=50), st.floats(0.01, 100.0))
def test_wanted_replicas_share_the_work_within_the_backlog_and_one_less_would_not(
    seconds: list[float], backlog_s: float
) -> None:
    wanted = wanted_replicas(seconds, backlog_s)
    assert wanted >= 1
    assert sum(seconds) / wanted <= backlog_s * (1 + 1e-6)
    if wanted > 1:
        assert sum(seconds) / (wanted - 1) > backlog_s


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=300))
def test_a_mean_lies_within_what_it_has_seen_and_the_first_samples_count_alike(samples: list[float]) -> None:
    pace = Pace()
    for number, sample in enumerate(samples, 1):
        pace.note_step(2.0, 1, sample)
        seen = samples[:number]
        assert min(seen) - 1e-9 <= pace.step_s <= max(seen) + 1e-9
        if number <= 64:
            assert pace.step_s == pytest.approx(float(np.mean(seen)), abs=1e-9)
    assert pace.tokens_per_forward == pytest.approx(2.0)


def test_the_signal_foresees_how_many_forwards_a_real_engine_takes() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(embedded_model())
    version = WeightVersion("test", 0, state_checksum(model.state_dict()))
    engine = Engine(model, tokenizer, max_sequences=8, weight_version=version)

    def requests(seed: int) -> list[Request]:
        return [
            Request(
                f"{seed}/{task.task_id}", tuple(tokenizer.encode(task.prompt).ids), DecodePolicy(threshold=0.9), max_tokens=72
            )
            for task in tasks(48, seed=seed, held_out=False)
        ]  # fmt: skip

    engine.generate(requests(1))
    stats = engine.stats()
    assert (stats["masks_running"], stats["masks_waiting"]) == (0, 0)
    assert 0.0 < stats["answer_share"] <= 1.0
    assert 0.0 < stats["step_s"] < 60.0
    for request in requests(2):
        engine.add(request)
    assert engine.stats()["masks_waiting"] == 48 * 72
    foreseen = load_of({**engine.stats(), "num_slots": 8}).forwards_left
    before = engine.forwards
    left = [foreseen]
    while engine.has_work:
        engine.step()
        left.append(load_of({**engine.stats(), "num_slots": 8}).forwards_left)
    # The end of a batch runs with free slots, so a little more than foreseen.
    assert engine.forwards - before == pytest.approx(foreseen, rel=0.35)
    assert left[-1] == 0.0
    assert left[len(left) // 2] == pytest.approx(foreseen / 2, rel=0.5)
