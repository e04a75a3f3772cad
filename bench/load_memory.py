"""How much memory loading a model takes: `python bench/load_memory.py FOLDER [DTYPE [RANK NUM_RANKS]]`, one JSON object.

With a rank it is that rank's part of the model that is loaded, as `fewstep serve tensor_parallel=NUM_RANKS` does.

Runs in a process of its own, so that the peak is this load's and nothing else's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import torch

from fewstep.kernels.model.checkpoint import embedded_model, load_model, load_state
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.sharding import Shard


def main() -> None:
    folder = Path(sys.argv[1])
    dtype = getattr(torch, sys.argv[2]) if len(sys.argv) > 2 else None
    torch.set_num_threads(1)
    load_model(embedded_model())  # what the libraries allocate at their first use is not the model's
    before = psutil.Process().memory_info().rss
    if len(sys.argv) > 3:
        state = load_state(folder, ModelConfig.load(folder), dtype, Shard(int(sys.argv[3]), int(sys.argv[4])))
    else:
        state = load_model(folder, dtype)[0].state_dict()
    peak = _peak_rss_bytes()
    weights = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    print(json.dumps({"weights_bytes": weights, "peak_bytes": peak - before}))


def _peak_rss_bytes() -> int:
    """The highest resident size of this program; getrusage's may be that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
