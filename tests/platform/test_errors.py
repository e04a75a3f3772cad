"""Errors cross processes by pickle: what a user would read there is what was raised here."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from fewstep.actors.serving import answers, body_errors, refusals, service
from fewstep.platform.errors import ActorDied, FewstepError, UserError

# They are found by their base once these modules are imported.
DEFINED_IN = {module.__name__ for module in (answers, body_errors, refusals, service)}


def below(base: type[FewstepError]) -> Iterator[type[FewstepError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from below(kind)


def arguments_of(kind: type[FewstepError]) -> tuple[Any, ...]:
    if issubclass(kind, UserError):
        return "a key", 3, "1 or 2", "write 1"
    if issubclass(kind, ActorDied):
        return "rank 1 of 2", "it was killed"
    return ("too busy", 2.5) if issubclass(kind, refusals._TryLater) else ("no answer",)


@pytest.mark.parametrize("kind", sorted(set(below(FewstepError)), key=str))
def test_an_error_is_itself_after_pickling(kind: type[FewstepError]) -> None:
    error = kind(*arguments_of(kind))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    told = {name: str(value) for name, value in vars(error).items()}
    assert {name: str(value) for name, value in vars(again).items()} == told


def test_the_errors_of_the_server_are_among_those() -> None:
    assert {kind.__module__ for kind in below(FewstepError)} >= DEFINED_IN
