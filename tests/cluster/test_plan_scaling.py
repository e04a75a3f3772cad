"""A simulated fleet that grows and shrinks: every request is answered, and what is paid for adds up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.cluster.plan.answers import MixedAnswers, ProfiledAnswers
from fewstep.cluster.plan.fleet_model import FleetSpec
from fewstep.cluster.plan.scaling_model import ScaledFleet, Scaling, Signal, burst
from fewstep.cluster.plan.settings import PolicyProfile, Workload
from fewstep.cluster.plan.step_cost import Fitted

PER_STEP = Fitted((0.05, *[0.0] * 8))
PROFILE = PolicyProfile(block_size=4, threshold=0.9, tokens_per_forward=2.0, quality=1.0)


def source(long_share: float = 0.0) -> MixedAnswers:
    kinds = [
        ProfiledAnswers(Workload(prompt_tokens=8, answer_tokens=tokens), PROFILE) for tokens in (16, 160)
    ]
    return MixedAnswers(kinds, (1.0 - long_share, long_share))


def fleet(scaling: Scaling, most: int = 6, seed: int = 0) -> ScaledFleet:
    return ScaledFleet(FleetSpec(PER_STEP, most, 4, 4000), scaling, seed)


@settings(max_examples=25, deadline=None)
@given(
    signal=st.sampled_from(["requests", "work"]), target=st.floats(0.2, 8.0), least=st.integers(1, 3), most=st.integers(3, 6),
    start_s=st.floats(0.0, 20.0), down_s=st.floats(0.0, 20.0), long_share=st.floats(0.0, 0.3), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_request_is_answered_and_the_fleet_stays_within_its_bounds(
    signal: Signal,
    target: float,
    least: int,
    most: int,
    start_s: float,
    down_s: float,
    long_share: float,
    seed: int,
) -> None:
    scaling = Scaling(signal, target, least, start_s, up_delay_s=1.0, down_delay_s=down_s)
    jobs = burst(source(long_share), ((1.0, 20.0), (12.0, 10.0), (0.5, 30.0)), seed)
    found = fleet(scaling, most, seed)
    run = found.simulate(jobs)
    assert len(run.latencies_s) == len(run.waits_s) == len(jobs)
    assert run.tokens == sum(job.answer.num_tokens for job in jobs)
    assert min(run.waits_s) >= 0.0
    assert max(run.waits_s) <= max(run.latencies_s)
    assert least <= found.scaled.most_replicas <= most
    end = run.seconds + jobs[0].arrival_s
    assert least * end - 1e-6 <= found.scaled.replica_seconds <= most * end + 1e-6
    assert run.busy_s <= found.scaled.replica_seconds + 1.0
    again = fleet(scaling, most, seed)
    assert (
        again.simulate(burst(source(long_share), ((1.0, 20.0), (12.0, 10.0), (0.5, 30.0)), seed)).latencies_s
        == run.latencies_s
    )
    assert again.scaled == found.scaled


@pytest.mark.parametrize("signal", ["requests", "work"])
def test_a_burst_brings_replicas_and_calm_ends_them(signal: Signal) -> None:
    scaling = Scaling(signal, 2.0, start_s=2.0, down_delay_s=5.0)
    calm = fleet(scaling)
    calm.simulate(burst(source(), ((0.5, 60.0),), 1))
    assert calm.scaled.most_replicas == 1
    rough = fleet(scaling)
    # The last requests come long after the burst: by then one replica is left.
    run = rough.simulate(burst(source(), ((0.5, 10.0), (20.0, 20.0), (0.2, 200.0)), 1))
    assert rough.scaled.most_replicas >= 3
    fixed = fleet(Scaling(signal, 1e9, start_s=2.0))
    fixed.simulate(burst(source(), ((0.5, 10.0), (20.0, 20.0), (0.2, 200.0)), 1))
    assert run.wait_s(95) < fixed.run.wait_s(95)
    assert rough.scaled.replica_seconds < 0.5 * rough.scaled.most_replicas * run.seconds


def test_work_tells_long_answers_from_short_ones() -> None:
    phases = ((2.0, 30.0), (4.0, 40.0))
    assert measured(1.0, phases) > measured(0.0, phases) == 1


def measured(long_share: float, phases: tuple[tuple[float, float], ...]) -> int:
    found = fleet(Scaling("work", 2.0, start_s=2.0))
    found.simulate(burst(source(long_share), phases, 0))
    return found.scaled.most_replicas
