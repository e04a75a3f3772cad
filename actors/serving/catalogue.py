"""The models behind one endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fewstep.actors.serving.service import CompletionService, ModelNotFound


class Catalogue:
    """Services by the name of their model.

    Args:
        services: at least one, each of another name; the first is the one that `/health` names.
    """

    def __init__(self, services: Sequence[CompletionService]) -> None:
        self._services = {service.model.name: service for service in services}
        assert len(self._services) == len(services) > 0

    def __getitem__(self, name: str) -> CompletionService:
        service = self._services.get(name)
        if service is None:
            served = ", ".join(map(repr, self._services))
            raise ModelNotFound("model", repr(name), served, "ask for a model served here")
        return service

    @property
    def services(self) -> tuple[CompletionService, ...]:
        return tuple(self._services.values())

    @property
    def healthy(self) -> bool:
        """Whether every engine takes requests."""
        return all(service.host.healthy for service in self.services)

    def stats(self) -> dict[str, Any]:
        """Counts over all engines, the first model's weight version, and `models`: each one's own."""
        counts = {name: service.host.stats() for name, service in self._services.items()}
        first = next(iter(counts.values()))
        summed = {key: _sum(counts, key) for key, value in first.items() if isinstance(value, int)}
        models = {
            name: {**stats, "origin": asdict(self._services[name].origin)} for name, stats in counts.items()
        }
        return {**summed, "weight_version": first["weight_version"], "models": models}


def _sum(counts: Mapping[str, Mapping[str, int | str]], key: str) -> int:
    return sum(int(stats[key]) for stats in counts.values())
