"""What a device can do at most, from its vendor's data sheet, and what an hour of it is taken to cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator, or one core's worth of a CPU.

    Attributes:
        flops_per_s: dense bf16 peak, no sparsity.
        memory_bytes_per_s: peak bandwidth of its own memory.
        memory_bytes: what it has of it.
        link_bytes_per_s: to another device of the same node, one direction.
        price_per_hour: USD; an assumption for comparisons, no quotation (`fleet.price_per_hour` replaces it).
        source: where the figures come from.
    """

    name: str
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    price_per_hour: float
    source: str


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("a100", 312e12, 2.039e12, 80e9, 300e9, 1.8, "NVIDIA A100 80GB SXM data sheet"),
        Device("h20", 148e12, 4.0e12, 96e9, 450e9, 1.6, "NVIDIA H20 figures as published by server vendors"),
        Device("h100", 989.4e12, 3.35e12, 80e9, 450e9, 2.5, "NVIDIA H100 SXM data sheet"),
        Device("h200", 989.4e12, 4.8e12, 141e9, 450e9, 3.2, "NVIDIA H200 SXM data sheet"),
        Device("b200", 2250e12, 8.0e12, 180e9, 900e9, 5.0, "NVIDIA DGX B200 data sheet, an eighth of it"),
        Device("l4", 121e12, 0.3e12, 24e9, 32e9, 0.7, "NVIDIA L4 data sheet"),
        # One thread with bf16 matrix instructions: 256 x 576 x 1536 at 221 GFLOP/s, a sum over memory at 26.8 GB/s.
        Device(
            "cpu", 221e9, 26.8e9, 12e9, 10e9, 0.05, "measured: one thread of a Xeon with bf16 instructions"
        ),
    )
}
