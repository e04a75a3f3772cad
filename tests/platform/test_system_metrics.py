"""GPU readings in the system metrics, with a stand-in for NVIDIA's library: this host need not have a card."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace

import pytest

from fewstep.platform.system_metrics import HostSampler, SystemMetrics


class NVMLError(Exception):
    """As pynvml's: one class for every failure of the library."""


class OneCard(ModuleType):
    """The part of pynvml that is asked, over one card; what is in `failing` raises."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.failing: set[str] = set()

    def nvmlInit(self) -> None:
        self._say("init", None)

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, _device: int) -> SimpleNamespace:
        return self._say("memory", SimpleNamespace(used=2_000_000, total=8_000_000))

    def nvmlDeviceGetUtilizationRates(self, _device: int) -> SimpleNamespace:
        return self._say("utilization", SimpleNamespace(gpu=40))

    def nvmlDeviceGetPowerUsage(self, _device: int) -> int:
        return self._say("power", 300_000)

    def _say(self, name: str, value: object) -> object:
        if name in self.failing:
            raise NVMLError(f"{name}: GPU is lost")
        return value


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> OneCard:
    card = OneCard()
    monkeypatch.setitem(sys.modules, "pynvml", card)
    return card


def _gpu(values: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix("gpu_0_"): value for key, value in values.items() if key.startswith("gpu_")}


def test_a_reading_that_fails_is_left_out_and_comes_back(card: OneCard) -> None:
    sampler = HostSampler()
    memory = {"memory_usage_megabytes": 2.0, "memory_usage_percentage": 25.0}
    rest = {"utilization_percentage": 40.0, "power_usage_watts": 300.0}
    assert _gpu(sampler()) == memory | rest
    card.failing = {"memory"}
    assert _gpu(sampler()) == rest
    card.failing = {"utilization", "power"}
    assert _gpu(sampler()) == memory
    card.failing = {"memory", "utilization", "power"}
    lost = sampler()
    assert _gpu(lost) == {}
    assert "cpu_utilization_percentage" in lost
    card.failing = set()
    assert _gpu(sampler()) == memory | rest


def test_sampling_goes_on_after_a_failure_in_its_middle(card: OneCard) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    enough = threading.Event()

    def log(values: Mapping[str, float], step: int) -> None:
        logged.append((step, _gpu({key.removeprefix("system/"): value for key, value in values.items()})))
        card.failing = {"memory", "utilization"} if step == 0 else set()
        if step == 2:
            enough.set()

    metrics = SystemMetrics(log, HostSampler(), interval_s=0.01)
    assert enough.wait(30)
    metrics.close()
    assert [step for step, _ in logged[:3]] == [0, 1, 2]
    assert set(logged[1][1]) == {"power_usage_watts"}
    assert logged[0][1] == logged[2][1] != {}


def test_a_library_that_does_not_start_means_no_cards(card: OneCard) -> None:
    card.failing = {"init"}
    assert _gpu(HostSampler()()) == {}
