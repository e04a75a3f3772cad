"""Ours beside the peers on this CPU: `python bench/peers.py --peers FOLDER`, `--help` for the rest.

The same weights, prompts and settings go through our engine and through every peer that runs on a CPU, in turn, each in
its own process and environment with one thread; the check that both decode the same tokens is part of the command, and
a row without it has no speed. Everything is in `bench/side_by_side`; results go to bench/results/peers-cpu.json and
from there into docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from bench.side_by_side.command import main

    sys.exit(main())
