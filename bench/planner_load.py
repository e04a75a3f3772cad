"""What the check of the planner's engine model measures on the real engine: step times, answers, open loops."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.cluster.plan.answers import Answer
from fewstep.cluster.plan.replica_model import Job, ReplicaModel
from fewstep.cluster.plan.step_cost import StepLoad
from fewstep.platform.records import Trajectory


def answer_of(trajectory: Trajectory, block_size: int, shared_tokens: int = 0) -> Answer:
    """The forwards that each block took, from the step at which each position was written."""
    prompt = len(trajectory.prompt_ids)
    blocks = (np.arange(len(trajectory.step_map)) + prompt) // block_size - prompt // block_size
    last = [int(trajectory.step_map[blocks == block].max()) + 1 for block in range(int(blocks.max()) + 1)]
    steps = np.diff([0, *last])
    return Answer(prompt, shared_tokens, tuple(int(n) for n in steps), trajectory.num_tokens, block_size)


class EngineClock:
    """Seconds that requests and steps are timed with.

    Args:
        kind: `wall`, or `cpu`: seconds of this process alone, in which waiting for the next request takes no time. On a
            machine that others use the first measures them as much as the engine.
    """

    def __init__(self, kind: Literal["wall", "cpu"]) -> None:
        self.kind = kind
        self._read = time.perf_counter if kind == "wall" else time.process_time
        self._skipped = 0.0
        self._start = self._read()

    def now(self) -> float:
        """Since the clock was made."""
        return self._read() - self._start + self._skipped

    def wait_until(self, when: float) -> None:
        """Idle until then."""
        left = max(0.0, when - self.now())
        if self.kind == "wall":
            time.sleep(left)
        else:
            self._skipped += left


def closed_loop(
    engine: Engine, requests: Sequence[Request], concurrency: int, clock: EngineClock
) -> tuple[list[Trajectory], list[float]]:
    """`concurrency` requests at any time, each followed by the next; trajectories in request order, seconds of each step."""
    ended: dict[str, Trajectory] = {}
    seconds, waiting = [], list(reversed(requests))
    while waiting or engine.has_work:
        started = clock.now()
        while waiting and engine.num_running + engine.num_waiting < concurrency:
            engine.add(waiting.pop())
        updates = engine.step()
        seconds.append(clock.now() - started)
        for update in updates:
            if update.trajectory is not None:
                ended[update.request_id] = update.trajectory
    return [ended[request.request_id] for request in requests], seconds


def replay(answers: Sequence[Answer], concurrency: int, num_pages: int) -> list[StepLoad]:
    """The steps that the planner's engine takes for the same answers in a closed loop."""
    replica = ReplicaModel(concurrency, num_pages)
    replica.waiting.extend(Job(0.0, answer) for answer in answers)
    loads = []
    while (load := replica.begin_step()) is not None:
        loads.append(load)
        replica.end_step()
    return loads


@dataclass(frozen=True)
class OpenLoop:
    """Answers of one open loop: latency from each request's due time, and tokens per second over the whole."""

    latencies_s: list[float]
    tokens_per_s: float
    forwards: int


def open_loop(
    engine: Engine, requests: Sequence[Request], arrivals_s: Sequence[float], clock: EngineClock
) -> OpenLoop:
    """Requests that come when they are due, whether or not the engine keeps up; `clock` starts with this call."""
    latencies, tokens, index = [], 0, 0
    due = {request.request_id: at for request, at in zip(requests, arrivals_s, strict=True)}
    before = engine.forwards
    while index < len(requests) or engine.has_work:
        while index < len(requests) and arrivals_s[index] <= clock.now():
            engine.add(requests[index])
            index += 1
        if not engine.has_work:
            clock.wait_until(arrivals_s[index])
            continue
        for update in engine.step():
            if update.trajectory is not None:
                latencies.append(clock.now() - due[update.request_id])
                tokens += update.trajectory.num_tokens
    seconds = clock.now() - arrivals_s[0]
    return OpenLoop(latencies, tokens / seconds, engine.forwards - before)
