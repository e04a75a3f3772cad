"""What ends a request, what counts, and what the engine charges: directed cases beside the random gates."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from tests.actors.engine.reference.compare import assert_same
from tests.actors.engine.reference.loop import decode
from tests.actors.engine.reference.models import (
    EOS,
    MASK,
    VERSION,
    build_model,
    engine_of,
    reference_model,
)
from tests.actors.engine.reference.requests import draw_decisive, draw_request

from fewstep.actors.engine import canvas
from fewstep.actors.engine.request import Request
from fewstep.kernels.head import head_confidence
from fewstep.kernels.model.checkpoint import state_checksum
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import CheckpointError, RequestError
from fewstep.platform.records import DecodePolicy, WeightVersion

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

GREEDY = DecodePolicy(threshold=0.6)
ONE_BY_ONE = DecodePolicy(kind="static", tokens_per_step=1)


def test_a_block_of_n_steps_costs_n_forwards() -> None:
    engine = engine_of()
    request = Request("a", tuple(range(3, 19)), ONE_BY_ONE, max_tokens=24)
    trajectory = engine.generate([request])[0]
    written = trajectory.step_map[trajectory.step_map >= 0]
    assert trajectory.forwards == engine.forwards == written.max() + 1
    assert sorted(set(written.tolist())) == list(range(trajectory.forwards))
    # Two prompt blocks ride in the first forward, each finished block once in the next block's first.
    num_blocks = len(trajectory.canvas_ids) // 8
    assert engine.rows == 8 * (trajectory.forwards + 2 + num_blocks - 1)


def test_only_masked_rows_go_through_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    projected = []

    def counted(hidden: torch.Tensor, rows: torch.Tensor, *others: object, **named: object) -> object:
        projected.append(len(rows))
        return head_confidence(hidden, rows, *others, **named)

    monkeypatch.setattr(canvas, "head_confidence", counted)
    request = Request("a", (4, 5, 6), ONE_BY_ONE, max_tokens=5, ignore_eos=True)
    # A static step projects whole blocks: its shapes may not depend on what is masked.
    engine_of(static_steps=False).generate([request])
    assert projected == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("kind", ["block_causal", "bidirectional"])
def test_positions_behind_an_end_of_sequence_are_filled_and_never_counted(kind: str) -> None:
    requests = [r for r in draw_decisive(random.Random(3), 90, kind) if r.policy.edit_threshold is None]
    filled = 0
    for request, trajectory in zip(requests, engine_of(kind=kind).generate(requests), strict=True):
        ends = () if request.ignore_eos else (EOS, *request.stop_ids)
        assert not np.isin(trajectory.completion_ids[:-1], ends).any()
        assert (trajectory.finish_reason == "stop") == (trajectory.completion_ids[-1] in ends)
        assert trajectory.num_tokens <= request.max_tokens
        nobody_chose = np.flatnonzero(np.isnan(trajectory.confidence) & (trajectory.step_map >= 0))
        filled += len(nobody_chose)
        assert (trajectory.canvas_ids[nobody_chose] == EOS).all()
        first_end = next((i for i, t in enumerate(trajectory.canvas_ids.tolist()) if t in ends), 0)
        assert (nobody_chose > first_end).all()
        assert ((trajectory.canvas_ids == MASK) == (trajectory.step_map < 0)).all()
    assert filled > 0


def test_max_tokens_only_truncates() -> None:
    request = Request("a", (4, 5, 6, 7, 8), ONE_BY_ONE, max_tokens=40)
    whole = engine_of().generate([request])[0]
    assert whole.num_tokens > 20
    for limit in (1, 2, 3, 4, 11, 12, 20):
        cut = engine_of().generate([dataclasses.replace(request, max_tokens=limit)])[0]
        assert cut.num_tokens == limit
        assert cut.finish_reason == "length"
        assert cut.completion_ids.tolist() == whole.completion_ids[:limit].tolist()
        assert cut.forwards <= whole.forwards


def test_an_end_of_sequence_counts_if_it_fits_and_only_then() -> None:
    requests = [Request(str(i), (i, 4, 5), ONE_BY_ONE, max_tokens=60) for i in range(3, 30)]
    free = engine_of().generate(requests)
    sizes = [(r, t.num_tokens) for r, t in zip(requests, free, strict=True) if t.finish_reason == "stop"]
    sizes = [(request, size) for request, size in sizes if size > 1]
    assert len(sizes) > 3
    for request, size in sizes:
        for limit, reason in ((size, "stop"), (size - 1, "length")):
            cut = dataclasses.replace(request, max_tokens=limit)
            trajectory = engine_of().generate([cut])[0]
            assert (trajectory.num_tokens, trajectory.finish_reason) == (limit, reason)
            assert_same(trajectory, decode(reference_model(), cut))


def test_an_end_of_sequence_in_the_prompt_ends_nothing() -> None:
    request = Request("a", (4, EOS, 6), ONE_BY_ONE, max_tokens=13)
    assert_same(engine_of().generate([request])[0], decode(reference_model(), request))


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    engine = engine_of()
    request = Request("a", (3, 4), GREEDY, max_tokens=3)
    engine.add(request)
    with pytest.raises(RequestError, match="request_id"):
        engine.add(request)
    with pytest.raises(RuntimeError, match="other requests"):
        engine.generate([dataclasses.replace(request, request_id="b")])
    while engine.has_work:
        engine.step()
    engine.add(request)


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_weights_that_do_not_fit_are_refused_whole(change: str) -> None:
    engine = engine_of()
    before = state_checksum(engine.model.state_dict())
    state = dict(build_model(seed=1).state_dict())
    if change == "missing":
        del state["norm.weight"]
    elif change == "surplus":
        state["extra"] = torch.zeros(1)
    else:
        state["norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"norm\.weight|extra"):
        engine.load_weights(state, WeightVersion("test", 1, "1" * 32))
    assert state_checksum(engine.model.state_dict()) == before
    assert engine.weight_version == VERSION


def test_counters_count_committed_tokens_only() -> None:
    rng = random.Random(17)
    engine = engine_of()
    trajectories = engine.generate([draw_request(rng, str(i)) for i in range(40)])
    assert engine.committed_tokens == sum(len(trajectory.completion_ids) for trajectory in trajectories)
    assert engine.committed_tokens < sum(len(trajectory.canvas_ids) for trajectory in trajectories)
    assert max(trajectory.forwards for trajectory in trajectories) <= engine.forwards


def test_the_engine_needs_no_gradients() -> None:
    engine = engine_of()
    assert isinstance(engine.model, Transformer)
    engine.generate([Request("a", (3, 4), GREEDY, max_tokens=3)])
    assert all(parameter.grad is None for parameter in engine.model.parameters())
