"""Receivers of pushed weights in processes of their own, as replicas are, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

from fewstep.actors.weight_sync.base import Echo, Payload
from fewstep.platform.records import WeightVersion


class ReceiverProcess:
    """Answers each push with the checksum of what it read, or with what went wrong.

    Args:
        dies_in_push: the process kills itself in this push, counted from 1, once it has joined the others' group.
        before_plan: it does so when it has checked in, and no plan is there yet.
        delay_s: how long it takes to begin with a push.
    """

    def __init__(self, dies_in_push: int = 0, *, before_plan: bool = False, delay_s: float = 0.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self.process = context.Process(
            target=_receive, args=(other, dies_in_push, before_plan, delay_s), daemon=True
        )
        self.process.start()
        other.close()
        self._thread = ThreadPoolExecutor(1)
        assert self._pipe.recv() == "ready"

    def __call__(self, payload: Payload, version: WeightVersion) -> Future[Echo]:
        return self._thread.submit(self._ask, payload, version)

    def _ask(self, payload: Payload, version: WeightVersion) -> Echo:
        self._pipe.send((payload, version))
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Echo)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self._thread.shutdown()
        self._pipe.close()


def _receive(pipe: Connection, dies_in_push: int, before_plan: bool, delay_s: float) -> None:
    import torch
    import torch.distributed

    from fewstep.actors.weight_sync.broadcast import _Group
    from fewstep.kernels.model.checkpoint import state_checksum

    torch.set_num_threads(1)
    pipe.send("ready")
    num_pushes = 0
    while True:
        payload, version = pipe.recv()
        num_pushes += 1
        time.sleep(delay_s)
        if num_pushes == dies_in_push and before_plan:
            # The plan is the first thing that a receiver asks the store for.
            torch.distributed.TCPStore.get = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        elif num_pushes == dies_in_push:
            _Group.broadcast = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        try:
            with payload.open() as state:
                answer: Echo | OSError = Echo(version, state_checksum(state))
        except OSError as error:
            answer = error
        pipe.send(answer)
