"""One simulated engine: the scheduling rules of actors/engine/scheduler.py for block-causal models, without tensors.

Requests join and leave between two forwards, first come first served; a finished block's keys and values are written by
the first forward of the next block; without free pages the youngest request gives its own up and recomputes them.
`tests/cluster/test_plan_engine.py` runs both side by side: same forwards, same rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fewstep.cluster.plan.answers import Answer
from fewstep.cluster.plan.step_cost import StepLoad


@dataclass(eq=False, slots=True)
class Job:
    """A request in the fleet: when it came (seconds), what it will take, how often it was started over."""

    arrival_s: float
    answer: Answer
    restarts: int = 0


@dataclass(eq=False, slots=True)
class _Running:
    """A job that holds a slot.

    Attributes:
        live: first position of its live block; cached: positions from 0 in pages; block, step: where it is in its answer.
    """

    job: Job
    live: int
    cached: int
    block: int = 0
    step: int = 0
    takes_part: bool = True

    @property
    def own_pages(self) -> int:
        return max(0, self.cached - self.job.answer.shared_tokens) // self.job.answer.block_size


class ReplicaModel:
    """What one engine would do next.

    Args:
        max_sequences: slots; num_pages: blocks of keys and values that it has memory for.
    Attributes:
        admitted: the jobs that got a slot when the last step began.
    """

    def __init__(self, max_sequences: int, num_pages: int) -> None:
        self.max_sequences, self.num_pages = max_sequences, num_pages
        self.free_pages = num_pages
        self.waiting: deque[Job] = deque()
        self.running: list[_Running] = []
        self.admitted: list[Job] = []
        self.preemptions = 0
        self._layout: tuple[tuple[int, int], ...] | None = None  # None: the last forward wrote pages

    @property
    def num_jobs(self) -> int:
        """Running and waiting."""
        return len(self.waiting) + len(self.running)

    def begin_step(self) -> StepLoad | None:
        """Admit, plan, and say what the next forward carries; None when there is nothing to do."""
        self.admitted = []
        while self.waiting and len(self.running) < self.max_sequences:
            job = self.waiting.popleft()
            self.admitted.append(job)
            size = job.answer.block_size
            self.running.append(
                _Running(job, job.answer.prompt_tokens // size * size, job.answer.shared_tokens)
            )
        rows = head_rows = sequences = context = attended = joined = 0
        widths: set[int] = set()
        layout: list[tuple[int, int]] = []
        for sequence in self.running:
            size, read = sequence.job.answer.block_size, sequence.cached
            sequence.takes_part = self._give_pages(sequence)
            if not sequence.takes_part:
                continue
            own = sequence.live + size - read
            steps = sequence.job.answer.steps[sequence.block]
            rows += own
            head_rows += max(1, round(size * (steps - sequence.step) / steps))
            sequences += 1
            context += read
            joined += sequence.block == sequence.step == 0
            attended += own * read + own * (own + size) // 2
            widths.add(own)
            layout.append((id(sequence), sequence.live))
            sequence.cached = sequence.live
        if not sequences:
            return None
        changed, writes = self._layout != (laid_out := tuple(layout)), rows > sequences * size
        self._layout = None if writes else laid_out
        return StepLoad(rows, head_rows, sequences, context, attended, len(widths), changed, joined)

    def end_step(self) -> list[Job]:
        """The forward is done: move every sequence that took part on; returns the jobs that ended."""
        ended, left = [], []
        for sequence in self.running:
            if sequence.takes_part:
                sequence.step += 1
                if sequence.step >= sequence.job.answer.steps[sequence.block]:
                    sequence.block, sequence.step = sequence.block + 1, 0
                    sequence.live += sequence.job.answer.block_size
            if sequence.block < len(sequence.job.answer.steps):
                left.append(sequence)
                continue
            self.free_pages += sequence.own_pages
            ended.append(sequence.job)
        self.running = left
        return ended

    def drop_caches(self) -> None:
        """New weights: every running request recomputes its keys and values; shared ones are gone, too."""
        for sequence in self.running:
            self.free_pages += sequence.own_pages
            sequence.cached = 0

    def fail(self) -> list[Job]:
        """The process is gone; returns every job it had."""
        lost = [sequence.job for sequence in self.running] + list(self.waiting)
        self.running, self.free_pages = [], self.num_pages
        self.waiting.clear()
        return lost

    def _give_pages(self, sequence: _Running) -> bool:
        shared = sequence.job.answer.shared_tokens
        start = max(sequence.cached, min(shared, sequence.live))
        need = (sequence.live - start) // sequence.job.answer.block_size
        while need > self.free_pages:
            younger = next((other for other in reversed(self.running) if other.own_pages), None)
            if younger is None or self.running.index(younger) <= self.running.index(sequence):
                self.preemptions += bool(sequence.own_pages)
                self.free_pages += sequence.own_pages
                sequence.cached = 0
                return False
            self.preemptions += 1
            self.free_pages += younger.own_pages
            younger.cached = 0
        self.free_pages -= need
        return True
