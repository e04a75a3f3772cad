"""Engines that a test's `EngineHost` opens in its own process, and weights that it reads there."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tests.actors.engine.reference.models import VERSION, build_model, build_tokenizer, engine_of

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request, Update
from fewstep.kernels.model.checkpoint import state_checksum
from fewstep.platform.errors import CheckpointError
from fewstep.platform.records import DecodePolicy, WeightVersion

ONE_BY_ONE = DecodePolicy(kind="static", tokens_per_step=1)
# Five forwards fill its first block and so yield an update; sixty bring it to its end.
LONG = Request("long", (4, 5, 6), ONE_BY_ONE, max_tokens=60, ignore_eos=True)


class SteppedEngine(Engine):
    """An engine that takes a step only for each byte that the test writes into a pipe by name."""

    def __init__(self, gate: Path) -> None:
        super().__init__(build_model(), build_tokenizer(), max_sequences=4, weight_version=VERSION)
        self._gate = os.open(gate, os.O_RDWR)

    def step(self) -> list[Update]:
        if self.has_work:
            os.read(self._gate, 1)
        return super().step()


class BrokenEngine(Engine):
    """An engine whose second forward does not come to its end.

    Args:
        way: raise, or crash as native code does.
    """

    def __init__(self, way: str) -> None:
        super().__init__(build_model(), build_tokenizer(), max_sequences=2, weight_version=VERSION)
        self._way = way

    def step(self) -> list[Update]:
        if self.forwards and self._way == "raise":
            raise MemoryError("no memory for the second forward")
        if self.forwards:
            print("the device is lost", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step()


def plain() -> Engine:
    return engine_of(max_sequences=3)


def missing() -> Engine:
    raise CheckpointError("weights", "nothing", "a model", "copy it there")


def not_opened() -> Engine:
    raise OSError("no such device")


def never_opened() -> Engine:
    """Loading that takes longer than any test."""
    time.sleep(3600)
    raise AssertionError


def other_weights(engine: Engine) -> tuple[Mapping[str, torch.Tensor], WeightVersion]:
    state = build_model(seed=1).state_dict()
    return state, WeightVersion("test", 1, state_checksum(state))


def first_weights(engine: Engine) -> tuple[Mapping[str, torch.Tensor], WeightVersion]:
    return build_model().state_dict(), VERSION


def no_weights(engine: Engine) -> tuple[Mapping[str, torch.Tensor], WeightVersion]:
    return {}, WeightVersion("test", 1, "0" * 32)


def no_numbers(engine: Engine) -> tuple[Mapping[str, torch.Tensor], WeightVersion]:
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in engine.model.state_dict().items()}
    return state, WeightVersion("poison", 1, "0" * 32)


def unreadable_weights(engine: Engine) -> tuple[Mapping[str, torch.Tensor], WeightVersion]:
    raise OSError("the disk is gone")
