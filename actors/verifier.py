"""Verifiers: answers in, verdicts out, in order. In this process, or as a pool of Ray actors that may be killed.

All Ray calls of verification are in this file. A worker holds nothing but its sandbox, so a dead one is replaced by
a fresh actor and its jobs are run again; Ray's own restarts stay off, because they would hide the death.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, Self

from fewstep.actors.deaths import cause_of_death
from fewstep.actors.judges import Judge, JudgeChoice, Tests
from fewstep.actors.placement import on_node, require_room
from fewstep.actors.sandbox.sandbox import Limits, Sandbox, require_layers
from fewstep.platform.errors import ActorDied
from fewstep.platform.records import Task, Verdict

_log = logging.getLogger(__name__)

TESTS = JudgeChoice()
_CHUNK = 16
_TRIES_PER_CHUNK = 3
_START_SECONDS = 120.0

Answer = tuple[Task, str]


class Verifier(Protocol):
    """What refinement and evaluation ask for."""

    judge: Judge
    replaced: int

    def verify(self, answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict for each (task, answer), in order, by its judge."""

    @property
    def isolation(self) -> str:
        """The sandbox's layers in force."""

    def missing(self, languages: Sequence[str]) -> dict[str, str]:
        """Those of the languages whose programs cannot be executed (checks that `executes`), each with the reason."""

    def close(self) -> None:
        """Ends everything it started."""


def _judge(sandbox: Sandbox, judge: Judge, answers: Sequence[Answer]) -> list[Verdict]:
    return [_judged(sandbox, judge, task, text) for task, text in answers]


def _judged(sandbox: Sandbox, judge: Judge, task: Task, text: str) -> Verdict:
    try:
        return judge.judge(task, text, sandbox)
    except Exception as error:
        # One that breaks on one odd answer must not take the run with it; that it broke is no verdict on the answer.
        # Of the built-in one it says that the caller's check is malformed.
        if isinstance(judge, Tests):
            raise
        detail = f"{type(judge).__name__} raised {type(error).__name__}: {error} (task {task.task_id})"
        _log.exception("verifier: %s", detail)
        return Verdict("sandbox_error", 0.0, (), 0.0, sandbox.isolation, detail)


def _missing(sandbox: Sandbox, languages: Sequence[str]) -> dict[str, str]:
    reasons = {language: sandbox.missing(language) for language in languages}
    return {language: reason for language, reason in reasons.items() if reason}


class LocalVerifier:
    """A verifier without Ray.

    Args:
        num_sandboxes: programs run at once; more than the free cores turns load into false timeouts.
        limits: ceilings of every program.
        judge: what is asked of an answer.
        require: isolation layers that must be in force (actors/sandbox/isolation.py).
    Raises:
        ResourceError: the host cannot isolate.
    """

    replaced = 0  # sandboxes start again by themselves

    def __init__(
        self,
        num_sandboxes: int = 1,
        limits: Limits | None = None,
        judge: JudgeChoice = TESTS,
        require: Sequence[str] = (),
    ) -> None:
        self._threads = ThreadPoolExecutor(num_sandboxes, thread_name_prefix="verifier")
        self._sandboxes: list[Sandbox] = []
        self._judges = [judge.build() for _ in range(num_sandboxes)]
        self.judge = self._judges[0]
        try:
            for _ in range(num_sandboxes):
                self._sandboxes.append(Sandbox(limits))
            require_layers(self.isolation, require)
        except BaseException:
            self.close()
            raise

    @property
    def isolation(self) -> str:
        """The layers in force."""
        return self._sandboxes[0].isolation

    def verify(self, answers: Sequence[Answer]) -> list[Verdict]:
        """See Verifier. Answers are dealt to the sandboxes in turn."""
        count = len(self._sandboxes)
        shares = [answers[index::count] for index in range(count)]
        verdicts: list[Verdict | None] = [None] * len(answers)
        for index, share in enumerate(self._threads.map(_judge, self._sandboxes, self._judges, shares)):
            verdicts[index::count] = share
        return [verdict for verdict in verdicts if verdict is not None]

    def missing(self, languages: Sequence[str]) -> dict[str, str]:
        """See Verifier."""
        return _missing(self._sandboxes[0], languages)

    def close(self) -> None:
        self._threads.shutdown()
        for sandbox in self._sandboxes:
            sandbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class VerifierWorker:
    """One sandbox behind an actor handle."""

    def __init__(self, limits: Limits, judge: JudgeChoice) -> None:
        self._judge = judge.build()
        self._sandbox = Sandbox(limits)

    def verify(self, answers: Sequence[Answer]) -> list[Verdict]:
        return _judge(self._sandbox, self._judge, answers)

    def missing(self, languages: Sequence[str]) -> dict[str, str]:
        return _missing(self._sandbox, languages)

    def describe(self) -> tuple[int, str]:
        """Process id and isolation layers."""
        return os.getpid(), self._sandbox.isolation


class VerifierPool:
    """Workers on the Ray cluster of the open session.

    Args:
        num_workers: sandboxes, each in an actor of its own.
        num_cpus: logical CPUs reserved for each; a fraction, because a verdict takes milliseconds.
        limits: ceilings of every program.
        judge: what is asked of an answer.
        require: isolation layers that must be in force on every worker's host.
        node_ids: where each worker starts while that node lives; empty = where Ray finds room.
    Raises:
        ResourceError: the cluster has too few free CPUs, says how many are free; or a host cannot isolate as asked.
        ConfigError: an unknown judge or option.
        ActorDied: a worker did not start; carries its last words.
    """

    def __init__(
        self,
        num_workers: int = 1,
        num_cpus: float = 0.1,
        limits: Limits | None = None,
        judge: JudgeChoice = TESTS,
        require: Sequence[str] = (),
        node_ids: Sequence[str] = (),
    ) -> None:
        import ray

        if node_ids and len(node_ids) != num_workers:
            raise ValueError(f"{len(node_ids)} nodes for {num_workers} verifiers")
        self.judge = judge.build()
        require_room("verifiers", num_workers, num_cpus)
        self._ray: Any = ray
        self._arguments = (limits or Limits(), judge)
        # Two at once: a worker says who it is while it judges. Its sandbox takes one program at a time anyway.
        self._actor: Any = self._ray.remote(
            num_cpus=num_cpus, max_restarts=0, max_task_retries=0, max_concurrency=2
        )(VerifierWorker)
        self._node_ids = tuple(node_ids) or (None,) * num_workers
        self._workers: list[Any] = []
        self.replaced = 0
        try:
            for index in range(num_workers):
                self._workers.append(self._spawn(index))
            self._layers = [layers for _, layers in self._describe()]
            for layers in self._layers:
                require_layers(layers, require)
        except BaseException:
            self.close()
            raise

    @property
    def isolation(self) -> str:
        """The layers in force on the first worker's host."""
        return self._layers[0]

    def pids(self) -> list[int]:
        """Process ids of the workers, in order."""
        return [pid for pid, _ in self._describe()]

    def _describe(self) -> list[tuple[int, str]]:
        try:
            found = self._ray.get(
                [worker.describe.remote() for worker in self._workers], timeout=_START_SECONDS
            )
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            raise ActorDied("verifier", cause_of_death(error)) from error
        return list(found)

    def verify(self, answers: Sequence[Answer]) -> list[Verdict]:
        """See Verifier. Work goes in chunks to whichever worker is free; a chunk whose worker dies is run again on the
        replacement.

        Raises:
            ActorDied: the same chunk lost _TRIES_PER_CHUNK workers.
        """
        chunks = {start: list(answers[start : start + _CHUNK]) for start in range(0, len(answers), _CHUNK)}
        waiting = deque((start, 1) for start in chunks)
        idle = list(range(len(self._workers)))
        running: dict[Any, tuple[int, int, int]] = {}
        verdicts: dict[int, list[Verdict]] = {}
        while waiting or running:
            while waiting and idle:
                start, tries = waiting.popleft()
                worker = idle.pop(0)
                running[self._workers[worker].verify.remote(chunks[start])] = (worker, start, tries)
            (done, *_), _ = self._ray.wait(list(running), num_returns=1)
            worker, start, tries = running.pop(done)
            try:
                verdicts[start] = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                if tries == _TRIES_PER_CHUNK:
                    raise ActorDied(
                        "verifier", f"{tries} times on the same answers: {cause_of_death(error)}"
                    ) from error
                self._replace(worker, error)
                waiting.appendleft((start, tries + 1))
            idle.append(worker)
        return [verdict for start in chunks for verdict in verdicts[start]]

    def missing(self, languages: Sequence[str]) -> dict[str, str]:
        """See Verifier. A language that one worker's host lacks is missing: any worker may get any program.

        Raises:
            ActorDied: a worker did not say within _START_SECONDS.
        """
        try:
            found = self._ray.get(
                [worker.missing.remote(list(languages)) for worker in self._workers], timeout=_START_SECONDS
            )
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            raise ActorDied("verifier", cause_of_death(error)) from error
        return {language: reason for reasons in found for language, reason in reasons.items()}

    def _spawn(self, worker: int) -> Any:
        return self._actor.options(**on_node(self._node_ids[worker])).remote(*self._arguments)

    def _replace(self, worker: int, cause: Exception) -> None:
        _log.warning("verifier %d died and is replaced: %s", worker, cause_of_death(cause))
        self._workers[worker] = self._spawn(worker)
        self.replaced += 1

    def close(self) -> None:
        """Kills the workers; their zygotes end with them."""
        for worker in self._workers:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker)
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
