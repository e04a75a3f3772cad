"""What a CUDA graph asks of the static step, shown on a CPU: fixed shapes and addresses, nothing read back, harmless padding.

That its results are the plain loop's is shown by the gates, which run with it, too. The last tests need a GPU.

Caught here when put into the step on purpose: a mask used as an index, a number read back, a tensor made from a Python
list, a shape that follows the number of masks, a unit of padding that writes a page or a canvas.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from tests.actors.engine.reference.compare import assert_equal, assert_same, drain, note, result, run
from tests.actors.engine.reference.models import BLOCK, VERSION, build_model, engine_of
from tests.actors.engine.reference.requests import draw_decisive, draw_prompt, expected
from tests.kernels.device import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.engine.static_step import StaticSteps, StepShape, live_bucket
from fewstep.kernels.attention import dispatch as attention
from fewstep.kernels.confidence import dispatch as confidence
from fewstep.kernels.head import dispatch as head
from fewstep.kernels.norm import dispatch as norm
from fewstep.kernels.rope import dispatch as rope
from fewstep.platform.records import DecodePolicy, WeightVersion

ONE_BY_ONE = DecodePolicy(kind="static", tokens_per_step=1)


class Recorder(TorchDispatchMode):
    """Every operation with the shapes and types that go in and come out; those that no graph can hold apart."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.unfit: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs, out))
        tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        self.operations.append(f"{func} {[(tuple(one.shape), one.dtype) for one in tensors]}")
        is_index = func in (
            torch.ops.aten.index.Tensor,
            torch.ops.aten.index_put.default,
            torch.ops.aten.index_put_.default,
        )
        # A list becomes a tensor on the host first (lift_fresh); the copy to the device would wait for it.
        if is_index:
            unfit = any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
            unfit = any(tag in func.tags for tag in tags) or func is torch.ops.aten.lift_fresh.default
        if unfit:
            self.unfit.add(str(func))
        return out


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel as a GPU runs it, under Triton's interpreter where there is none."""
    pytest.importorskip("triton", reason="triton has no wheel for this system")
    for module in (attention, confidence, head, norm, rope):
        monkeypatch.setattr(module, "implementation_for", lambda op, impl, tensor: impl or "fused")


def static_of(engine: Engine) -> StaticSteps:
    assert engine._static is not None
    return engine._static


@contextlib.contextmanager
def recorded(engine: Engine) -> Iterator[dict[StepShape, list[Recorder]]]:
    """What each static step of an engine runs, by shape."""
    static, steps = static_of(engine), {}
    compute = static.compute

    def record(shape: StepShape):
        with Recorder() as recorder:
            decision = compute(shape)
        steps.setdefault(shape, []).append(recorder)
        return decision

    static.compute = record
    yield steps
    static.compute = compute


@pytest.mark.parametrize("kind", ["block_causal", "bidirectional"])
@pytest.mark.skipif(DEVICE.type == "cuda", reason="operations are recorded where they run one by one")
def test_a_shape_always_runs_the_same_operations_and_reads_nothing_back(kind: str, fused: None) -> None:
    base = {"cache": "dual", "block_size": 5} if kind == "bidirectional" else {}
    policies = [
        DecodePolicy(kind="static", **base),
        DecodePolicy(kind="static", temperature=0.7, seed=1, **base),
        DecodePolicy(kind="static", edit_threshold=0.3, max_edit_steps=2, **base),
        DecodePolicy(kind="entropy_bound", entropy_bound=0.05, temperature=0.7, seed=3, **base),
    ]
    requests = [
        Request(str(n), draw_prompt(random.Random(n), 5 + 6 * n), policy, max_tokens=12)
        for n, policy in enumerate(policies)
    ]
    engine = engine_of(kind=kind, static_steps=True)
    with recorded(engine) as steps:
        updates = run(engine, requests)
    assert len(steps) > 2
    assert max(map(len, steps.values())) > 2
    for shape, recorders in steps.items():
        assert len(recorders[0].operations) > 50
        assert not recorders[0].unfit, shape
        for other in recorders[1:]:
            assert other.operations == recorders[0].operations
    for request in requests:
        assert expected(request, kind).decisive
        assert_same(result(updates, request), expected(request, kind), num_extra_forwards=None)


def test_the_recorder_sees_what_no_graph_can_hold() -> None:
    numbers = torch.arange(4)
    for unfit in (
        lambda: numbers[numbers > 1],
        lambda: numbers.max().item(),
        lambda: (numbers > 1).nonzero(),
        lambda: numbers.clone().index_put_((numbers > 1,), numbers[:1]),
        lambda: torch.tensor([1, 2]) + numbers[:2],
        lambda: numbers.repeat_interleave(numbers),
    ):
        with Recorder() as recorder:
            unfit()
        assert recorder.unfit


def state_of(engine: Engine) -> list[torch.Tensor]:
    """Everything a step may write, but for the sink."""
    canvases, store = engine._canvases, engine._store
    kept = (canvases.tokens, canvases.step_map, canvases.confidence, canvases.logprob)
    return [tensor[: canvases.sink_slot] for tensor in kept] + [store.keys, store.values]


@pytest.mark.parametrize("kind", ["block_causal", "bidirectional"])
def test_a_step_on_padding_changes_nothing(kind: str) -> None:
    """A graph is warmed up in the middle of the traffic, on inputs that hold nothing but padding."""
    engine = engine_of(kind=kind, static_steps=True)
    policy = DecodePolicy(kind="static", cache="dual" if kind == "bidirectional" else "exact")
    # The oldest, in slot 0, has masks in its first block still.
    for number in range(3):
        prompt = draw_prompt(random.Random(number), 3 + 9 * number)
        engine.add(Request(str(number), prompt, policy, max_tokens=20, ignore_eos=True))
    for _ in range(3):
        engine.step()
    static = static_of(engine)
    assert static.forwards > 0
    before = [tensor.clone() for tensor in state_of(engine)]
    for (shape, inputs), entropy in itertools.product(static._inputs.items(), (False, True)):
        with torch.inference_mode():
            inputs.clear()
            decision = static.compute(StepShape(*shape, entropy))
        assert not decision.report[:, 0].any()
        assert not decision.edited.any()
    for tensor, old in zip(state_of(engine), before, strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)


def addresses(engine: Engine) -> list[int]:
    canvases, inputs = engine._canvases, static_of(engine)._inputs
    tensors = [value for value in vars(canvases).values() if isinstance(value, torch.Tensor)]
    tensors += [engine._store.keys, engine._store.values, *engine.model.parameters(), *engine.model.buffers()]
    for shape in [(1, 0), (4, 0)]:
        tensors += [inputs[shape].numbers, inputs[shape].page_table]
    return [tensor.data_ptr() for tensor in tensors]


def test_traffic_failures_and_new_weights_leave_every_tensor_where_it_is() -> None:
    engine = engine_of(max_sequences=4, static_steps=True, memory_bytes=None)
    requests = draw_decisive(random.Random(3), 12)
    alone = Request("alone", (3, 4), ONE_BY_ONE, max_tokens=20)
    together = [Request(str(i), (3, 4, i), ONE_BY_ONE, max_tokens=30, ignore_eos=True) for i in range(3, 7)]
    engine.generate([alone])
    engine.generate(together)
    before = addresses(engine)
    engine.load_weights(build_model(seed=1).to(DEVICE).state_dict(), WeightVersion("test", 1, "1" * 32))
    engine.generate(requests)
    engine.load_weights(build_model(seed=0).to(DEVICE).state_dict(), VERSION)
    engine.generate(together)
    assert addresses(engine) == before
    for request, trajectory in zip(requests, engine.generate(requests), strict=True):
        assert_same(trajectory, expected(request), num_extra_forwards=None)


def test_steps_that_fit_are_taken_and_only_those() -> None:
    """Every forward of a block-causal batch without a nucleus is made of units: prompts, merged commits and edits, too."""
    requests = draw_decisive(random.Random(5), 60)
    fitting = [
        request
        for request in requests
        if (request.policy.top_p == 1 or request.policy.temperature == 0) and request.policy.cache == "exact"
    ]
    assert sum(request.policy.edit_threshold is not None for request in fitting) > 5
    assert sum(len(request.prompt_ids) > BLOCK for request in fitting) > 5
    engine = engine_of(max_sequences=7, static_steps=True)
    for request, trajectory in zip(fitting, engine.generate(fitting), strict=True):
        assert_same(trajectory, expected(request))
    assert engine.stats()["static_forwards"] == engine.forwards
    nucleus = DecodePolicy(temperature=0.7, top_p=0.8)
    for other in (nucleus, DecodePolicy(kind="static", cache="none")):
        before = engine.stats()["static_forwards"]
        engine.generate([Request("other", draw_prompt(random.Random(1), 11), other, max_tokens=9)])
        assert engine.stats()["static_forwards"] == before
    off = engine_of(max_sequences=7, static_steps=False)
    off.generate(fitting[:4])
    assert off.stats()["static_forwards"] == 0


def test_a_long_prompt_is_left_to_the_other_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.actors.engine.static_step._MAX_FINISHED_ROWS", 3 * BLOCK)
    for blocks in (3, 4):
        request = Request("a", draw_prompt(random.Random(2), blocks * BLOCK + 1), ONE_BY_ONE, max_tokens=5)
        engine = engine_of(static_steps=True)
        assert_same(engine.generate([request])[0], expected(request))
        assert engine.forwards - engine.stats()["static_forwards"] == (blocks > 3)


@pytest.mark.parametrize("kind", ["block_causal", "bidirectional"])
def test_both_ways_in_turns_share_one_state(kind: str) -> None:
    """A request that no static step can serve comes and goes: the others change from one way to the other and back."""
    policy = DecodePolicy(
        kind="static", cache="dual" if kind == "bidirectional" else "exact", temperature=0.5
    )
    long = [
        Request(f"long {n}", draw_prompt(random.Random(n), 9 + n), policy, max_tokens=30, ignore_eos=True)
        for n in range(3)
    ]
    nucleus = policy.model_copy(update={"top_p": 0.9})
    short = [Request(f"short {n}", draw_prompt(random.Random(n), 7), nucleus, max_tokens=3) for n in range(4)]
    engine = engine_of(kind=kind, static_steps=True)
    updates: dict = {}
    for request in long:
        engine.add(request)
    for request in short:
        for _ in range(4):
            for update in engine.step():
                updates.setdefault(update.request_id, []).append(update)
        engine.add(request)
    drain(engine, updates)
    static = engine.stats()["static_forwards"]
    assert 5 < static < engine.forwards - 5
    for request in long + short:
        if expected(request, kind).decisive:
            assert_same(result(updates, request), expected(request, kind), num_extra_forwards=None)


@pytest.mark.parametrize("between", [False, True])
def test_pages_that_moved_under_an_equal_layout_are_noticed(between: bool) -> None:
    """New weights in the middle of a block: both requests write their prompts again, and each gets the other's page.

    The forward behind it looks like one before: as many rows at the same positions. With `between` the rewrite is a forward
    that no static step can do, so that the static one before and the one behind have the same layout.
    """
    ones = [
        Request(f"{n}", draw_prompt(random.Random(n), BLOCK + n), ONE_BY_ONE, max_tokens=9, ignore_eos=True)
        for n in range(2)
    ]
    nucleus = DecodePolicy(kind="static", temperature=0.7, top_p=0.8)
    other = Request("other", draw_prompt(random.Random(4), 3), nucleus, max_tokens=9, ignore_eos=True)
    engine = engine_of(static_steps=True, prefix_cache=False)
    for request in ones:
        engine.add(request)
    updates: dict = {}
    steps = 2 if between else 1
    for _ in range(steps):
        note(updates, engine.step())
    pages = [sequence.pages[:] for sequence in engine._scheduler.running.values()]
    engine.load_weights(build_model(seed=0).to(DEVICE).state_dict(), WeightVersion("same", 1, "0" * 32))
    if between:
        engine.add(other)
    note(updates, engine.step())
    engine.abort("other")
    moved = [sequence.pages[:] for sequence in engine._scheduler.running.values()]
    assert pages != moved
    assert sorted(pages) == sorted(moved)
    assert engine.stats()["static_forwards"] == steps + (not between)
    drain(engine, updates)
    for request in ones:
        assert expected(request).decisive
        assert_same(result(updates, request), expected(request), num_extra_forwards=None)


def test_buckets_hold_their_count_and_waste_less_than_half() -> None:
    assert [live_bucket(count) for count in (1, 2, 3, 4, 5, 8, 9, 16, 17, 64)] == [
        1,
        2,
        4,
        4,
        8,
        8,
        16,
        16,
        24,
        64,
    ]
    assert all(count <= live_bucket(count) < 2 * count for count in range(1, 300))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an accelerator")
@pytest.mark.parametrize("kind", ["block_causal", "bidirectional"])
def test_graphs_give_what_the_same_step_gives_without_them(kind: str) -> None:
    requests = draw_decisive(random.Random(9), 40, kind)
    graphs = engine_of(max_sequences=7, kind=kind, static_steps=True)
    plain = engine_of(max_sequences=7, kind=kind, static_steps=True)
    assert static_of(graphs)._graphs is not None
    static_of(plain)._graphs = None
    for _ in range(2):
        for one, other in zip(graphs.generate(requests), plain.generate(requests), strict=True):
            assert_equal(one, other)
        for engine in (graphs, plain):
            engine.load_weights(build_model(seed=0, kind=kind).to(DEVICE).state_dict(), VERSION)
    assert graphs.stats()["static_forwards"] == plain.stats()["static_forwards"] > 20
