"""A fleet of simulated engines, event by event: arrivals, steps, deaths, restarts, weight pushes.

Time is virtual. The same seed and the same demand give the same run, and arrivals, answers and failures have streams of
their own, so that a change of one does not reshuffle the others.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fewstep.cluster.plan.answers import AnswerSource
from fewstep.cluster.plan.replica_model import Job, ReplicaModel
from fewstep.cluster.plan.step_cost import StepCost
from fewstep.pipelines.load_summary import arrivals
from fewstep.platform.rng import generator

Kind = Literal["arrival", "step", "fail", "up", "push", "pushed", "tick"]


@dataclass(frozen=True)
class FleetSpec:
    """The simulated machines.

    Attributes:
        max_sequences, num_pages: of each replica.
        mean_s_between_failures: of one replica; None = none. restart_s: until it steps again.
        push_every_s: new weights; None = never. push_s: every replica stands still for it.
    """

    cost: StepCost
    num_replicas: int
    max_sequences: int
    num_pages: int
    mean_s_between_failures: float | None = None
    restart_s: float = 0.0
    push_every_s: float | None = None
    push_s: float = 0.0


@dataclass
class FleetRun:
    """What happened.

    Attributes:
        waits_s: from a job's arrival to its slot, in order of admission; a job that begins again waits again.
        latencies_s: of answered jobs, in order of completion; ends: their times and tokens; seconds: from the first arrival to the last answer.
        tokens: that count; forwards, rows: of all replicas; busy_s: seconds of stepping, summed over replicas.
        restarted: jobs begun again after a death; preemptions: pages taken from running requests.
    """

    waits_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    ends: list[tuple[float, int]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    forwards: int = 0
    rows: int = 0
    busy_s: float = 0.0
    restarted: int = 0
    preemptions: int = 0
    failures: int = 0
    pushes: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def latency_s(self, percentile: float, warm_up: float = 0.0) -> float:
        """A percentile of the answers' latencies, 0 to 100, without the first share `warm_up` of the answers."""
        return float(np.percentile(self.latencies_s[int(warm_up * len(self.latencies_s)) :], percentile))

    def wait_s(self, percentile: float) -> float:
        """A percentile of the waits, 0 to 100."""
        return float(np.percentile(self.waits_s, percentile))

    def steady_tokens_per_s(self) -> float:
        """Between the first and the last fifth of the answers: neither filling up nor draining."""
        first, last = len(self.ends) // 5, len(self.ends) * 4 // 5
        tokens = sum(tokens for _, tokens in self.ends[first + 1 : last + 1])
        return tokens / (self.ends[last][0] - self.ends[first][0])


@dataclass(eq=False)
class _Replica:
    """A simulated engine and its clockwork; events of an older `epoch` are void.

    Attributes:
        up: it steps; leaving: but takes nothing new. step_s: of the last step.
    """

    model: ReplicaModel
    up: bool = True
    leaving: bool = False
    stepping: bool = False
    paused: bool = False
    epoch: int = 0
    step_s: float = 0.0


class FleetModel:
    """Runs jobs through a fleet to their end.

    Each arrival goes to the less loaded of two random replicas that are up (the power of two choices, as Ray Serve
    routes); what a death interrupts begins again elsewhere, and its latency counts from its first arrival.
    """

    def __init__(self, spec: FleetSpec, seed: int = 0) -> None:
        self.spec = spec
        self.run = FleetRun()
        self._replicas = [
            _Replica(ReplicaModel(spec.max_sequences, spec.num_pages)) for _ in range(spec.num_replicas)
        ]
        self._routes = generator(seed, "routes")
        self._failures = generator(seed, "failures")
        self._events: list[tuple[float, int, Kind, int, int]] = []
        self._count = itertools.count()
        self._homeless: list[Job] = []
        self._now = 0.0

    def simulate(self, jobs: Sequence[Job]) -> FleetRun:
        """Every job to its answer; `jobs` in order of arrival."""
        for index, job in enumerate(jobs):
            self._at(job.arrival_s, "arrival", index)
        if self.spec.mean_s_between_failures is not None:
            for index in range(len(self._replicas)):
                self._at(self._failures.exponential(self.spec.mean_s_between_failures), "fail", index)
        if self.spec.push_every_s is not None:
            self._at(self.spec.push_every_s, "push")
        while len(self.run.latencies_s) < len(jobs):
            self._now, _, kind, index, epoch = heapq.heappop(self._events)
            if kind == "arrival":
                self._route(jobs[index])
            elif kind == "push":
                self._push()
            elif kind == "tick":
                self._tick()
            elif epoch == self._replicas[index].epoch or kind == "fail":
                self._replica_event(kind, index)
        self.run.seconds = self._now - jobs[0].arrival_s
        self.run.preemptions = sum(replica.model.preemptions for replica in self._replicas)
        return self.run

    def _tick(self) -> None:
        """A look at the whole fleet; this one is as large as it is."""

    def _at(self, when: float, kind: Kind, index: int = -1, epoch: int = 0) -> None:
        heapq.heappush(self._events, (when, next(self._count), kind, index, epoch))

    def _route(self, job: Job) -> None:
        up = [index for index, replica in enumerate(self._replicas) if replica.up and not replica.leaving]
        if not up:
            self._homeless.append(job)
            return
        pair = self._routes.choice(len(up), size=min(2, len(up)), replace=False)
        chosen = min((up[int(index)] for index in pair), key=self._load)
        self._replicas[chosen].model.waiting.append(job)
        self._start_step(chosen)

    def _load(self, index: int) -> float:
        """What the router goes by."""
        return self._replicas[index].model.num_jobs

    def _start_step(self, index: int) -> None:
        replica = self._replicas[index]
        if not replica.up or replica.stepping or replica.paused:
            return
        load = replica.model.begin_step()
        self.run.waits_s += [self._now - job.arrival_s for job in replica.model.admitted]
        if load is None:
            return
        replica.step_s = self.spec.cost.step_s(load)
        replica.stepping = True
        self.run.forwards += 1
        self.run.rows += load.rows
        self.run.busy_s += replica.step_s
        self._at(self._now + replica.step_s, "step", index, replica.epoch)

    def _replica_event(self, kind: Kind, index: int) -> None:
        replica = self._replicas[index]
        if kind == "step":
            replica.stepping = False
            for job in replica.model.end_step():
                self.run.latencies_s.append(self._now - job.arrival_s)
                self.run.tokens += job.answer.num_tokens
                self.run.ends.append((self._now, job.answer.num_tokens))
        elif kind == "pushed":
            replica.paused = False
            replica.model.drop_caches()
        elif kind == "fail":
            self._fail(index)
        elif kind == "up":
            replica.up = True
            homeless, self._homeless = self._homeless, []
            for job in homeless:
                self._route(job)
        self._start_step(index)

    def _fail(self, index: int) -> None:
        replica, spec = self._replicas[index], self.spec
        assert spec.mean_s_between_failures is not None
        again = spec.restart_s + self._failures.exponential(spec.mean_s_between_failures)
        self._at(self._now + again, "fail", index)
        replica.up = replica.stepping = replica.paused = False
        replica.epoch += 1
        self.run.failures += 1
        self._at(self._now + spec.restart_s, "up", index, replica.epoch)
        for job in replica.model.fail():
            job.restarts += 1
            self.run.restarted += 1
            self._route(job)

    def _push(self) -> None:
        assert self.spec.push_every_s is not None
        self.run.pushes += 1
        self._at(self._now + self.spec.push_every_s, "push")
        for index, replica in enumerate(self._replicas):
            if replica.up:
                # A step under way ends first; then the replica stands still until its weights are there.
                replica.paused = True
                self._at(self._now + self.spec.push_s, "pushed", index, replica.epoch)


def poisson_jobs(source: AnswerSource, rate_per_s: float, count: int, seed: int) -> list[Job]:
    """Jobs that arrive independently of each other, `rate_per_s` in the mean."""
    answers = generator(seed, "answers")
    return [Job(at, source.draw(answers)) for at in arrivals(rate_per_s, count, seed)]


def burst_jobs(source: AnswerSource, count: int, seed: int) -> list[Job]:
    """Jobs that are all there at once, as the rollouts of a training step are."""
    answers = generator(seed, "answers")
    return [Job(0.0, source.draw(answers)) for _ in range(count)]
