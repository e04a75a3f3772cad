"""`fewstep plan`: rooflines against their formulas, trees against their bounds, and the page a user reads."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.__main__ import main
from fewstep.cluster.plan.bottleneck import scales
from fewstep.cluster.plan.broadcast import (
    Link,
    from_holders,
    simulate,
    tree_children,
    tree_depth,
    tree_parent,
)
from fewstep.cluster.plan.devices import DEVICES
from fewstep.cluster.plan.job import make_plan, read_model
from fewstep.cluster.plan.refine_ratio import best_ratio, update_s
from fewstep.cluster.plan.settings import (
    ControlPlane,
    PlanConfig,
    PlannedFleet,
    PlannedModel,
    PolicyProfile,
    Workload,
)
from fewstep.cluster.plan.sizing import num_pages, size_for
from fewstep.cluster.plan.step_cost import Roofline, StepLoad
from fewstep.kernels.model.checkpoint import embedded_model, load_model

LINK = Link(1e9, 1e-3)
IDEAL = PlannedFleet(compute_share=1.0, bandwidth_share=1.0, overhead_s=0.0)


@pytest.mark.parametrize(
    ("name", "rows"), [("a100", 153), ("h100", 295), ("h200", 206), ("b200", 281), ("l4", 403), ("h20", 37)]
)
def test_ridges_are_those_of_the_data_sheets(name: str, rows: int) -> None:
    # A dense bf16 product is bound by arithmetic from F * w / (2 * BW) rows on, w = 2 bytes.
    device = DEVICES[name]
    assert device.flops_per_s / device.memory_bytes_per_s == pytest.approx(rows, rel=0.01)


def test_a_dense_step_costs_the_same_until_the_ridge_and_then_grows_with_its_rows() -> None:
    model = PlannedModel(vocab_size=1, hidden_size=1)
    cost = Roofline(DEVICES["h100"], model, IDEAL)
    steps = [cost.step_s(StepLoad(rows, 0, 1, 0, 0)) for rows in (1, 128, 590, 1180)]
    assert steps[0] == steps[1] == pytest.approx(8.2e9 * 2 / 3.35e12)
    assert steps[3] / steps[2] == pytest.approx(2.0)


def test_a_mixture_reads_the_experts_its_rows_touch() -> None:
    # LLaDA2.0-mini in bf16: 16.3 B parameters of which 15.3 B are experts, 8 of 256 a row.
    model = PlannedModel(
        parameters=16.3e9,
        active_parameters=1.4e9,
        expert_parameters=15.3e9,
        num_experts=256,
        num_experts_per_tok=8,
    )
    cost = Roofline(DEVICES["h100"], model, IDEAL)
    assert cost.weight_bytes(32) == pytest.approx(21.5e9, rel=0.02)
    assert cost.weight_bytes(128) == pytest.approx(32.1e9, rel=0.02)


def test_the_default_shares_give_the_published_step_of_diffusion_gemma() -> None:
    # 26 GB of FP8 weights read a step of 256 rows on an H100: vLLM measures 9.1 ms.
    model = PlannedModel(
        parameters=26e9,
        active_parameters=4e9,
        expert_parameters=0,
        weight_bytes_per_parameter=1,
        vocab_size=262144,
    )
    step_s = Roofline(DEVICES["h100"], model, PlannedFleet(overhead_s=0.0)).step_s(
        StepLoad(256, 256, 1, 4096, 0)
    )
    assert step_s == pytest.approx(9.1e-3, rel=0.05)


def test_ranks_divide_a_step_and_pay_for_their_exchange() -> None:
    model, load = PlannedModel(), StepLoad(512, 512, 8, 4096, 0)
    one = Roofline(DEVICES["h100"], model, PlannedFleet(overhead_s=0)).step_s(load)
    four = Roofline(DEVICES["h100"], model, PlannedFleet(overhead_s=0, tensor_parallel=4)).step_s(load)
    slow = PlannedFleet(overhead_s=0, tensor_parallel=4, link_latency_s=1e-3)
    assert one / 4 < four < one
    assert Roofline(DEVICES["h100"], model, slow).step_s(load) > one


@given(num_nodes=st.integers(1, 3000), fan_out=st.integers(1, 9))
def test_every_node_but_the_source_has_one_parent_in_the_tree(num_nodes: int, fan_out: int) -> None:
    seen = [child for node in range(num_nodes) for child in tree_children(node, num_nodes, fan_out)]
    assert sorted(seen) == list(range(1, num_nodes))
    assert all(
        node in tree_children(tree_parent(node, fan_out), num_nodes, fan_out) for node in range(1, num_nodes)
    )
    depth = tree_depth(num_nodes, fan_out)
    full = sum(fan_out**level for level in range(depth))
    assert full < num_nodes <= full + fan_out**depth


@given(count=st.integers(1, 600), fan_out=st.integers(1, 6), buckets=st.integers(1, 30))
def test_a_tree_takes_between_its_floor_and_its_pipeline(count: int, fan_out: int, buckets: int) -> None:
    num_bytes = buckets * 1e6
    found = simulate(count, num_bytes, LINK, fan_out=fan_out, bucket_bytes=1e6)
    bucket_s, depth = 1e6 / LINK.bytes_per_s, tree_depth(count + 1, fan_out)
    width = min(fan_out, count)
    assert found.depth == depth
    assert found.seconds >= buckets * width * bucket_s * 0.999  # the source's uplink
    assert found.seconds <= (depth + buckets) * fan_out * bucket_s + depth * LINK.hop_s + 1e-9
    assert found.source_bytes == num_bytes * width


def test_a_tree_of_ten_thousand_grows_with_the_logarithm_and_one_uplink_with_the_number() -> None:
    size = 16e9
    tree = [simulate(n, size, LINK, bucket_bytes=64e6).seconds for n in (10, 100, 1000, 10_000)]
    flat = [simulate(n, size, LINK, fan_out=None, bucket_bytes=64e6).seconds for n in (10, 100, 1000)]
    assert flat[2] / flat[0] == pytest.approx(100, rel=0.02)
    assert tree[3] < 1.1 * tree[0]  # nine more hops of a bucket each
    steps = [after - before for before, after in itertools.pairwise(tree)]
    assert max(steps) < 1.0
    holders = [from_holders(n, size, LINK).seconds for n in (1, 10, 100, 1000)]
    assert holders == pytest.approx([16 * math.ceil(math.log2(n + 1)) for n in (1, 10, 100, 1000)], rel=0.01)


@given(count=st.integers(1, 300), dead_share=st.floats(0.0, 0.6), seed=st.integers(0, 20))
def test_a_trees_dead_nodes_cost_a_detection_and_nobodys_weights(
    count: int, dead_share: float, seed: int
) -> None:
    calm = simulate(count, 20e6, LINK, bucket_bytes=1e6)
    rough = simulate(count, 20e6, LINK, bucket_bytes=1e6, dead_share=dead_share, detect_s=0.5, seed=seed)
    assert rough.adopted == 0 or rough.seconds >= 0.5
    assert rough.depth <= calm.depth


def small(**changes: object) -> PlanConfig:
    values: dict[str, object] = {
        "num_requests": 60,
        "fleet": PlannedFleet(devices=("h100", "l4"), max_sequences=16),
        "workload": Workload(tokens_per_s=20_000, p95_s=3.0, prompt_tokens=128, answer_tokens=128),
        "max_simulated_replicas": 4,
    }
    return PlanConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_a_looser_bound_needs_no_more_devices_and_more_demand_no_fewer() -> None:
    config, profile = small(), PolicyProfile(block_size=4, threshold=0.9, tokens_per_forward=2.3, quality=0.7)

    def devices(p95_s: float, tokens_per_s: float) -> int:
        workload = config.workload.model_copy(update={"p95_s": p95_s, "tokens_per_s": tokens_per_s})
        return size_for(
            config.model_copy(update={"workload": workload}), DEVICES["h100"], profile
        ).num_devices

    assert 0 < devices(3.0, 20_000) <= devices(1.0, 20_000)
    assert devices(3.0, 20_000) < devices(3.0, 60_000)


def test_what_cannot_be_met_says_why() -> None:
    profile = PolicyProfile(block_size=4, threshold=0.9, tokens_per_forward=2.3, quality=0.7)
    huge = small(model=PlannedModel(parameters=100e9, active_parameters=100e9))
    assert "200 GB" in size_for(huge, DEVICES["h100"], profile).reason
    slow = size_for(small(), DEVICES["l4"], profile)
    assert not slow.met
    assert "alone" in slow.reason


def test_pages_are_what_the_weights_leave() -> None:
    config = small(fleet=PlannedFleet(tensor_parallel=2, memory_share=1.0))
    blocks = num_pages(config, DEVICES["h100"], 4)
    assert blocks == int((160e9 - 16.4e9) / (2 * 36 * 8 * 128 * 2 * 4))


def test_the_best_ratio_balances_rollouts_and_updates() -> None:
    config = small(control=ControlPlane(object_put_bytes_per_s=1e12, load_s_per_gb=0.0))
    profile = config.profiles[0]
    ratio = best_ratio(config, DEVICES["h100"], profile)
    assert ratio is not None
    assert ratio.best.step_s == min(split.step_s for split in ratio.splits)
    updates = [split.update_s for split in ratio.splits]
    rollouts = [split.rollout_s for split in ratio.splits]
    assert updates == sorted(updates, reverse=True)
    assert rollouts == sorted(rollouts)
    assert update_s(config, DEVICES["h100"], 8) == pytest.approx(
        6 * 8.2e9 * (128 + 3 * 128) * 1024 / (8 * 989.4e12 * 0.35)
    )
    tight = small(model=PlannedModel(parameters=900e9, active_parameters=900e9))
    assert best_ratio(tight, DEVICES["h100"], profile) is None


def test_the_controller_binds_where_its_thread_is_full() -> None:
    found = scales(small(control=ControlPlane(num_replicas=(10, 10_000), call_s=2.5e-4, heartbeat_s=2.0)))
    assert found[0].controller_share < 0.01
    assert found[1].controller_share > 1.0
    assert found[1].binds.startswith("controller")


def test_the_sizes_of_a_folder_are_read() -> None:
    model, _ = load_model(embedded_model())
    found = read_model(PlannedModel(folder="embedded"))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.kv_bytes_per_token == 2 * 4 * 4 * 32 * 2


def test_the_command_writes_its_report_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan", "examples/cluster/plan.yaml", f"out={tmp_path}", "num_requests=50", "max_simulated_replicas=2",
        "fleet.max_sequences=8", 'fleet.devices=["h100"]', "control.num_replicas=[10,1000]", "refine.rollouts_per_step=64",
    ]  # fmt: skip
    assert main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cheapest"]["device"] == "h100"
    assert report["cheapest"]["p95_s"] <= report["settings"]["workload"]["p95_s"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.yaml", "report.json", "report.md", "cost.png", "scale.png", "ratio.png"
    }  # fmt: skip
    page = (tmp_path / "report.md").read_text()
    assert page.startswith(capsys.readouterr().out.split("\nwritten to")[0].rstrip())
    assert all(
        (tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("cost.png", "scale.png", "ratio.png")
    )


def test_the_same_seed_plans_the_same() -> None:
    config = small(fleet=PlannedFleet(devices=("h100",), max_sequences=8))
    assert make_plan(config).as_data() == make_plan(config).as_data()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("workload.min_quality=0.99", "min_quality"),
        ("model.num_experts=8", "expert_parameters"),
        ("workload.shared_prompt_tokens=9999", "shared_prompt_tokens"),
        (
            "profiles=[{block_size: 4, threshold: 0.9, tokens_per_forward: 5, quality: 1}]",
            "tokens_per_forward",
        ),
        ("fleet.device=[h100]", "devices"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused_in_one_line(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", override, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
