"""A simulated fleet whose size follows its load, by the count of requests or by the work that these have left.

What scales is the service's own: `actors.engine.pace` learns, `actors.serving.load_signal` foresees and decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fewstep.actors.engine.pace import Pace
from fewstep.actors.serving.load_signal import Load, load_of, wanted_replicas
from fewstep.actors.serving.scaling_config import ScalingConfig
from fewstep.cluster.plan.answers import Answer, AnswerSource
from fewstep.cluster.plan.fleet_model import FleetModel, FleetRun, FleetSpec, Kind
from fewstep.cluster.plan.replica_model import Job, ReplicaModel
from fewstep.pipelines.load_summary import arrivals
from fewstep.platform.rng import derive_seed, generator

Signal = Literal["requests", "work"]
_State = Literal["off", "starting", "up", "leaving"]
_SERVICE = ScalingConfig()
ALLOWANCES = (64, 256, 1024)
"""What clients pass as `max_tokens`: the least of these that holds the answer."""


@dataclass(frozen=True)
class Scaling:
    """How the fleet's size follows its load.

    Attributes:
        signal: requests = so many open requests a replica (`target`), as Ray Serve scales by itself; work = so many
            seconds of work (`target`). Routing goes by the same.
        start_s: from the decision to a replica's first step; the others: `ScalingConfig`'s.
    """

    signal: Signal
    target: float
    min_replicas: int = _SERVICE.min_replicas
    start_s: float = 20.0
    up_delay_s: float = _SERVICE.up_delay_s
    down_delay_s: float = _SERVICE.down_delay_s
    interval_s: float = _SERVICE.interval_s


@dataclass
class ScaledRun:
    """What was paid for.

    Attributes:
        replica_seconds: from each start's decision to its end; most_replicas: at once.
    """

    replica_seconds: float = 0.0
    most_replicas: int = 0


class ScaledFleet(FleetModel):
    """`spec.num_replicas` are the most there can be. A replica that is to end takes nothing new and finishes what it has."""

    def __init__(self, spec: FleetSpec, scaling: Scaling, seed: int = 0) -> None:
        super().__init__(spec, seed)
        self._scaling, self._paces = scaling, [Pace() for _ in self._replicas]
        self.scaled = ScaledRun()
        self._states: list[_State] = ["off"] * spec.num_replicas
        for index, replica in enumerate(self._replicas):
            replica.up = index < scaling.min_replicas
            self._states[index] = "up" if replica.up else "off"
        self._direction, self._since, self._last_look = 0, 0.0, 0.0

    def simulate(self, jobs: Sequence[Job]) -> FleetRun:
        """As `FleetModel.simulate`; `scaled` has what it cost."""
        self._at(self._scaling.interval_s, "tick")
        run = super().simulate(jobs)
        self._pay()
        return run

    def _load(self, index: int) -> float:
        if self._scaling.signal == "requests":
            return super()._load(index)
        return _load(self._replicas[index].model, self._paces[index]).seconds_left

    def _replica_event(self, kind: Kind, index: int) -> None:
        if kind == "step":
            part = [sequence for sequence in self._replicas[index].model.running if sequence.takes_part]
            tokens = math.fsum(s.job.answer.block_size / s.job.answer.steps[s.block] for s in part)
            self._paces[index].note_step(tokens, len(part), self._replicas[index].step_s)
        elif kind == "up" and self._states[index] == "starting":
            self._states[index] = "up"
        done = len(self.run.ends)
        super()._replica_event(kind, index)
        for _, num_tokens in self.run.ends[done:]:
            self._paces[index].note_answer(num_tokens, _allowance(num_tokens))

    def _tick(self) -> None:
        self._pay()
        self._at(self._now + self._scaling.interval_s, "tick")
        for index, replica in enumerate(self._replicas):
            if self._states[index] == "leaving" and not replica.model.num_jobs:
                self._states[index], replica.up, replica.leaving = "off", False, False
        self._resize()

    def _resize(self) -> None:
        """Starts or ends replicas where more or fewer have been wanted for long enough: Serve's own rule."""
        scaling = self._scaling
        there = [index for index, state in enumerate(self._states) if state in ("up", "starting")]
        wanted = min(max(self._wanted(), scaling.min_replicas), len(self._replicas))
        direction = (wanted > len(there)) - (wanted < len(there))
        if direction != self._direction:
            self._direction, self._since = direction, self._now
        delay_s = scaling.up_delay_s if direction > 0 else scaling.down_delay_s
        if not direction or self._now - self._since < delay_s:
            return
        self._direction = 0
        if direction < 0:
            for index in sorted(there, key=lambda index: self._replicas[index].model.num_jobs)[
                : len(there) - wanted
            ]:
                self._end(index)
            return
        free = [index for index, state in enumerate(self._states) if state == "off"]
        for index in free[: wanted - len(there)]:
            self._states[index], self._paces[index] = "starting", Pace()
            self._at(self._now + scaling.start_s, "up", index, self._replicas[index].epoch)

    def _end(self, index: int) -> None:
        replica = self._replicas[index]
        if self._states[index] == "starting":
            self._states[index], replica.epoch = "off", replica.epoch + 1
        else:
            self._states[index], replica.leaving = "leaving", True

    def _wanted(self) -> int:
        live = [index for index, state in enumerate(self._states) if state in ("up", "leaving")]
        if self._scaling.signal == "requests":
            return math.ceil(
                sum(self._replicas[index].model.num_jobs for index in live) / self._scaling.target
            )
        return wanted_replicas([self._load(index) for index in live], self._scaling.target)

    def _pay(self) -> None:
        paid = sum(state != "off" for state in self._states)
        self.scaled.replica_seconds += paid * (self._now - self._last_look)
        self.scaled.most_replicas = max(self.scaled.most_replicas, paid)
        self._last_look = self._now


def burst(source: AnswerSource, rates: Sequence[tuple[float, float]], seed: int) -> list[Job]:
    """Poisson arrivals whose rate changes: (requests a second, for so many seconds), one after the other."""
    answers, jobs, start = generator(seed, "answers"), list[Job](), 0.0
    for phase, (rate, seconds) in enumerate(rates):
        count = math.ceil(rate * seconds + 6 * math.sqrt(rate * seconds) + 6)
        due = [at for at in arrivals(rate, count, derive_seed(seed, "phase", phase)) if at < seconds]
        jobs += [Job(start + at, source.draw(answers)) for at in due]
        start += seconds
    return jobs


def _allowance(num_tokens: int) -> int:
    return next((size for size in ALLOWANCES if size >= num_tokens), num_tokens)


def _load(model: ReplicaModel, pace: Pace) -> Load:
    def written(block: int, step: int, answer: Answer) -> float:
        return answer.block_size * (block + step / answer.steps[block])

    allowed = [_allowance(sequence.job.answer.num_tokens) for sequence in model.running]
    found = [written(s.block, s.step, s.job.answer) for s in model.running]
    return load_of(
        {
            "num_running": len(model.running), "num_waiting": len(model.waiting), "num_slots": model.max_sequences,
            "masks_running": math.fsum(max(0.0, most - done) for most, done in zip(allowed, found, strict=True)),
            "masks_waiting": sum(_allowance(job.answer.num_tokens) for job in model.waiting),
            "tokens_per_forward": pace.tokens_per_forward, "step_s": pace.step_s,
            "answer_tokens": pace.answer_tokens, "answer_share": pace.answer_share,
        }
    )  # fmt: skip
