"""What a machine is doing while a run runs: processor, memory, disk, network and GPUs, sampled every ten seconds.

One sampler a node, and one writer for all of them: the driver samples its own host, other nodes' samplers are asked
and their numbers logged here. The names are those of MLflow's own monitor, so that its page shows them; that monitor
itself writes to the store on its own, and stops for good when the store fails once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from fewstep.platform.errors import ResourceError

_logger = logging.getLogger(__name__)

SYSTEM_CLOCK = "system/cpu_utilization_percentage"
"""The metric whose last step says how many samples a run has."""
_INTERVAL_S = 10.0
_MEGABYTE = 1e6

Sample = Callable[[], Mapping[str, float]]


class HostSampler:
    """Samples the host it is called on. Network counts from the sampler's start."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        psutil.cpu_percent()  # the first call has no interval to speak of
        self._network = psutil.net_io_counters()
        self._devices = _nvidia_devices()

    def __call__(self) -> dict[str, float]:
        psutil = self._psutil
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / _MEGABYTE,
            "disk_available_megabytes": disk.free / _MEGABYTE,
        }
        if network is not None and self._network is not None:
            received, sent = (
                getattr(network, name) - getattr(self._network, name) for name in ("bytes_recv", "bytes_sent")
            )
            values |= {
                "network_receive_megabytes": received / _MEGABYTE,
                "network_transmit_megabytes": sent / _MEGABYTE,
            }
        for number, device in enumerate(self._devices):
            values |= {f"gpu_{number}_{name}": value for name, value in _nvidia_sample(device).items()}
        return {name: round(float(value), 1) for name, value in values.items()}


class SystemMetrics:
    """A thread that logs every node's sample.

    Args:
        log: takes metrics and a step, such as `MlflowTracker.log_metrics`.
        host: samples this host.
        first_step: number of the first sample.
        interval_s: between two samples.
    """

    def __init__(
        self,
        log: Callable[[Mapping[str, float], int], None],
        host: Sample,
        first_step: int = 0,
        *,
        interval_s: float | None = None,
    ) -> None:
        self._log, self._step, self._interval_s = log, first_step, interval_s or _INTERVAL_S
        self._nodes: dict[str, Sample] = {"": host}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fewstep-system-metrics", daemon=True)
        self._thread.start()

    def add(self, name: str, sample: Sample) -> None:
        """Another node; one whose sampler raises ResourceError is gone, and left out from then on."""
        self._nodes[name] = sample

    def close(self) -> None:
        """Ends the thread; takes no longer than a sample does."""
        self._closing.set()
        self._thread.join(timeout=self._interval_s)

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            values: dict[str, float] = {}
            for name, sample in list(self._nodes.items()):
                prefix = f"system/{name}/" if name else "system/"
                try:
                    values |= {f"{prefix}{key}": value for key, value in sample().items()}
                except (ResourceError, OSError) as error:
                    _logger.warning("system metrics of %s end here: %s", name or "this host", error)
                    del self._nodes[name]
            if values and not self._closing.is_set():
                self._log(values, self._step)
                self._step += 1


def _nvidia_devices() -> list[Any]:
    """Handles of the GPUs of this host; none without NVIDIA's library (`fewstep[gpu]`) or driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _nvidia_sample(device: Any) -> dict[str, float]:
    """What a GPU says of itself; a part of one, and some cards, do not know their power or utilisation."""
    import pynvml

    values: dict[str, float] = {}
    with suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(device)
        values["memory_usage_megabytes"] = memory.used / _MEGABYTE
        values["memory_usage_percentage"] = 100.0 * memory.used / memory.total
    with suppress(pynvml.NVMLError):
        values["utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(device).gpu)
    with suppress(pynvml.NVMLError):
        values["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(device) / 1000.0
    return values
