"""How much memory loading a model takes: `python bench/load_memory.py FOLDER [DTYPE]`, one JSON object.

Runs in a process of its own, so that the peak is this load's and nothing else's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import torch

from fewstep.kernels.model.checkpoint import embedded_model, load_model


def main() -> None:
    folder = Path(sys.argv[1])
    dtype = getattr(torch, sys.argv[2]) if len(sys.argv) > 2 else None
    torch.set_num_threads(1)
    load_model(embedded_model())  # what the libraries allocate at their first use is not the model's
    before = psutil.Process().memory_info().rss
    model, _ = load_model(folder, dtype)
    peak = _peak_rss_bytes()
    weights = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
    print(json.dumps({"weights_bytes": weights, "peak_bytes": peak - before}))


def _peak_rss_bytes() -> int:
    """The highest resident size of this program; getrusage's may be that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
