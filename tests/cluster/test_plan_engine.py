"""The planner's engine against the real one, and the laws that any fleet obeys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench.planner_load import EngineClock, answer_of, closed_loop, open_loop, replay
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.cluster.plan.answers import Answer, MeasuredAnswers, ProfiledAnswers
from fewstep.cluster.plan.fleet_model import FleetModel, FleetSpec, burst_jobs, poisson_jobs
from fewstep.cluster.plan.replica_model import Job, ReplicaModel
from fewstep.cluster.plan.settings import PolicyProfile, Workload
from fewstep.cluster.plan.step_cost import Fitted, StepLoad, fit
from fewstep.kernels.model.checkpoint import embedded_model, load_model, state_checksum
from fewstep.pipelines.tasks.family import tasks
from fewstep.platform.records import DecodePolicy, WeightVersion
from fewstep.platform.rng import generator

PER_STEP = Fitted((1.0, *[0.0] * 8))  # every step takes a second
PER_ROW = Fitted((0.0, 1.0, *[0.0] * 7))


def make_engine(slots: int, memory_bytes: int | None = None) -> Engine:
    torch.set_num_threads(1)
    model, tokenizer = load_model(embedded_model())
    version = WeightVersion("test", 0, state_checksum(model.state_dict()))
    return Engine(
        model,
        tokenizer,
        max_sequences=slots,
        weight_version=version,
        prefix_cache=False,
        memory_bytes=memory_bytes,
    )


def requests_for(engine: Engine, count: int, policies: list[DecodePolicy]) -> list[Request]:
    return [
        Request(
            task.task_id,
            tuple(engine.tokenizer.encode(task.prompt).ids),
            policies[index % len(policies)],
            max_tokens=72,
        )
        for index, task in enumerate(tasks(count, seed=5, held_out=False))
    ]


@pytest.mark.parametrize("concurrency", [1, 5, 12])
def test_same_forwards_and_rows_as_the_real_engine(concurrency: int) -> None:
    engine = make_engine(12)
    policies = [DecodePolicy(threshold=0.9), DecodePolicy(kind="static", tokens_per_step=3)]
    requests = requests_for(engine, 20, policies)
    done, seconds = closed_loop(engine, requests, concurrency, EngineClock("cpu"))
    answers = [answer_of(trajectory, engine.config.block_size) for trajectory in done]
    loads = replay(answers, concurrency, int(engine.stats()["pages_total"]))
    assert [sum(answer.steps) for answer in answers] == [trajectory.forwards for trajectory in done]
    assert len(loads) == len(seconds) == engine.forwards
    assert sum(load.rows for load in loads) == engine.rows


def test_same_forwards_and_preemptions_when_memory_is_short() -> None:
    full = make_engine(8)
    policies = [DecodePolicy(kind="static", tokens_per_step=2)]
    page_bytes = int(full.stats()["page_bytes"])
    engine = make_engine(8, memory_bytes=10 * page_bytes)
    done, _ = closed_loop(engine, requests_for(engine, 16, policies), 8, EngineClock("cpu"))
    stats = engine.stats()
    replica = ReplicaModel(8, int(stats["pages_total"]))
    replica.waiting.extend(Job(0.0, answer_of(item, engine.config.block_size)) for item in done)
    rows = forwards = 0
    while (load := replica.begin_step()) is not None:
        rows, forwards = rows + load.rows, forwards + 1
        replica.end_step()
    assert stats["preemptions"] > 0
    assert (forwards, rows, replica.preemptions) == (engine.forwards, engine.rows, stats["preemptions"])
    assert replica.free_pages == replica.num_pages


def test_an_open_loop_answers_everything_and_waits_for_what_is_due() -> None:
    engine = make_engine(4)
    requests = requests_for(engine, 6, [DecodePolicy(threshold=0.7)])
    arrivals = [float(5 * index) for index in range(6)]
    done = open_loop(engine, requests, arrivals, EngineClock("cpu"))
    assert len(done.latencies_s) == 6
    assert max(done.latencies_s) < 5.0  # each is alone
    assert done.tokens_per_s < 80 * 6 / 25


def draws(count: int, seed: int = 0) -> list[Answer]:
    source = ProfiledAnswers(
        Workload(prompt_tokens=40, answer_tokens=48),
        PolicyProfile(block_size=8, threshold=0.9, tokens_per_forward=2.5, quality=0.5),
    )
    random = generator(seed, "draws")
    return [source.draw(random) for _ in range(count)]


def test_drawn_answers_have_the_profiles_tokens_per_forward_and_the_workloads_length() -> None:
    answers = draws(3000)
    blocks = [steps for answer in answers for steps in answer.steps]
    assert 8 / np.mean(blocks) == pytest.approx(2.5, rel=0.03)
    assert np.mean([answer.num_tokens for answer in answers]) == pytest.approx(48, rel=0.05)
    assert all(8 * len(answer.steps) >= answer.num_tokens for answer in answers)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 40),
    replicas=st.integers(1, 4),
    slots=st.integers(1, 6),
    pages=st.integers(40, 400),
    failing=st.booleans(),
    pushing=st.booleans(),
    rate=st.floats(0.01, 5.0),
    seed=st.integers(0, 5),
)
def test_every_job_is_answered_once_whatever_fails(
    count: int, replicas: int, slots: int, pages: int, failing: bool, pushing: bool, rate: float, seed: int
) -> None:
    source = MeasuredAnswers(draws(20, seed))
    spec = FleetSpec(
        PER_STEP, replicas, slots, pages,
        mean_s_between_failures=400.0 if failing else None, restart_s=30.0,
        push_every_s=90.0 if pushing else None, push_s=4.0,
    )  # fmt: skip
    jobs = poisson_jobs(source, rate, count, seed)
    run = FleetModel(spec, seed).simulate(jobs)
    assert len(run.latencies_s) == count
    assert run.tokens == sum(job.answer.num_tokens for job in jobs)
    assert run.restarted == sum(job.restarts for job in jobs)
    # A step is a second: nobody is faster than its own forwards, and no replica steps more than all the time.
    shortest = min(sum(job.answer.steps) for job in jobs)
    assert min(run.latencies_s) >= shortest - 1e-6
    assert run.busy_s <= replicas * (run.seconds + 1.0) + 1e-6
    again = FleetModel(spec, seed).simulate(poisson_jobs(source, rate, count, seed))
    assert again.latencies_s == run.latencies_s


def test_more_replicas_never_make_a_burst_slower() -> None:
    source = MeasuredAnswers(draws(50))
    seconds = [
        FleetModel(FleetSpec(PER_ROW, n, 8, 4000)).simulate(burst_jobs(source, 120, 1)).seconds
        for n in (1, 2, 4, 8)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] / seconds[3] > 5.0


def test_a_failure_costs_its_jobs_a_fresh_start_and_no_answer() -> None:
    source = MeasuredAnswers(draws(5))
    calm = FleetModel(FleetSpec(PER_STEP, 2, 4, 4000)).simulate(poisson_jobs(source, 0.2, 200, 3))
    spec = FleetSpec(PER_STEP, 2, 4, 4000, mean_s_between_failures=120.0, restart_s=20.0)
    rough = FleetModel(spec).simulate(poisson_jobs(source, 0.2, 200, 3))
    assert rough.failures > 3
    assert rough.restarted > 0
    assert rough.latency_s(95) > calm.latency_s(95)
    assert rough.tokens == calm.tokens


def test_a_fit_finds_the_prices_that_made_the_seconds() -> None:
    random = generator(1, "fit")
    loads = [
        StepLoad(
            *(int(v) for v in random.integers(1, 500, size=5)),
            int(random.integers(1, 4)),
            bool(random.integers(2)),
            1,
        )
        for _ in range(200)
    ]
    truth = Fitted((0.002, 1e-5, 3e-6, 0.0, 1e-7, 2e-7, 4e-4, 6e-4, 0.0))
    noise = random.normal(1.0, 0.02, size=len(loads))
    found = fit(loads, [truth.step_s(load) * n for load, n in zip(loads, noise, strict=True)])
    ratios = [found.step_s(load) / truth.step_s(load) for load in loads]
    assert max(abs(ratio - 1.0) for ratio in ratios) < 0.05
    assert min(found.coefficients) >= 0.0
