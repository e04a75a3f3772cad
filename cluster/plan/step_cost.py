"""Seconds of one engine step: from a roofline where nothing was measured, from a fit where something was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fewstep.cluster.plan.devices import Device
from fewstep.cluster.plan.settings import PlannedFleet, PlannedModel


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one forward carries.

    Attributes:
        rows: token positions that pass through the layers; head_rows: those of them that the head projects.
        sequences: requests that take part.
        context: cached positions read, summed over requests; attended: pairs (row, position it sees) over all requests.
        groups: different numbers of rows that requests bring, each a call of attention; changed: whether the engine lays the
            forward out anew, because its requests, their blocks or their pages are not those of the forward before; joined:
            requests that take part for the first time.
    """

    rows: int
    head_rows: int
    sequences: int
    context: int
    attended: int
    groups: int = 1
    changed: bool = False
    joined: int = 0


class StepCost(Protocol):
    """Anything that prices a step."""

    def step_s(self, load: StepLoad) -> float:
        """Seconds from one step's start to the next one's."""


@dataclass(frozen=True)
class Roofline:
    """The larger of what must be read and what must be computed, plus what nothing hides (docs/cluster.md has the terms).

    A mixture of experts reads the experts that at least one row is routed to: the share 1 - (1 - k/E)^rows, if routing
    is uniform. Tensor-parallel ranks divide reads and arithmetic, and all-reduce twice a layer.
    """

    device: Device
    model: PlannedModel
    fleet: PlannedFleet

    def step_s(self, load: StepLoad) -> float:
        model, fleet, ranks = self.model, self.fleet, self.fleet.tensor_parallel
        read = self.weight_bytes(load.rows) + load.context * model.kv_bytes_per_token
        read_s = read / (ranks * self.device.memory_bytes_per_s * fleet.bandwidth_share)
        embedding = model.vocab_size * model.hidden_size
        flops = 2.0 * (model.active_parameters - embedding) * load.rows + 2.0 * embedding * load.head_rows
        flops += 4.0 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * load.attended
        compute_s = flops / (ranks * self.device.flops_per_s * fleet.compute_share)
        return fleet.overhead_s + max(read_s, compute_s) + self._exchange_s(load.rows)

    def weight_bytes(self, rows: int) -> float:
        """Weights that a step with so many rows reads."""
        model = self.model
        touched = 1.0
        if model.num_experts:
            touched = 1.0 - (1.0 - model.num_experts_per_tok / model.num_experts) ** rows
        read = model.parameters - model.expert_parameters * (1.0 - touched)
        return read * model.weight_bytes_per_parameter

    def _exchange_s(self, rows: int) -> float:
        ranks = self.fleet.tensor_parallel
        if ranks == 1:
            return 0.0
        moved = 2.0 * rows * self.model.hidden_size * 2.0 * (ranks - 1) / ranks
        once = self.fleet.link_latency_s + moved / self.device.link_bytes_per_s
        return 2.0 * self.model.num_hidden_layers * once


@dataclass(frozen=True)
class Fitted:
    """A linear price: seconds for a step, row, head row, sequence, cached position, attended pair, group, new layout, and newcomer."""

    coefficients: tuple[float, ...]

    def step_s(self, load: StepLoad) -> float:
        return float(np.dot(self.coefficients, _features(load)))

    def scaled(self, factor: float) -> Fitted:
        """The same on a machine `factor` times slower."""
        return Fitted(tuple(factor * value for value in self.coefficients))


def fit(loads: Sequence[StepLoad], seconds: Sequence[float]) -> Fitted:
    """The non-negative price with the least squared relative error over measured steps.

    Relative to what the price says, not to what was measured: the latter would favour prices below the mean of noisy
    steps. A negative price is noise of features that grow together: the most negative one is dropped, the rest fitted again.
    Raises:
        ValueError: fewer measurements than prices.
    """
    rows = np.array([_features(load) for load in loads], dtype=float)
    target = np.asarray(seconds, dtype=float)
    if len(rows) < _NUM_FEATURES:
        raise ValueError(f"{len(rows)} measured steps cannot fix {_NUM_FEATURES} prices")
    scale = np.full(len(target), target.mean())
    for _ in range(_REWEIGHTINGS):
        coefficients = _non_negative(rows / scale[:, None], target / scale)
        scale = np.maximum(rows @ coefficients, target.min())
    return Fitted(tuple(float(value) for value in coefficients))


def _non_negative(
    rows: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    target: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    kept = list(range(_NUM_FEATURES))
    while True:
        found, *_ = np.linalg.lstsq(rows[:, kept], target, rcond=None)
        if found.min() >= 0.0:
            break
        kept.pop(int(found.argmin()))
    coefficients = np.zeros(_NUM_FEATURES)
    coefficients[kept] = found
    return coefficients


_REWEIGHTINGS = 4
_NUM_FEATURES = 9


def _features(load: StepLoad) -> tuple[float, ...]:
    return (
        1.0, load.rows, load.head_rows, load.sequences, load.context, load.attended, load.groups, float(load.changed),
        load.joined,
    )  # fmt: skip
