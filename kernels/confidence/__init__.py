"""Statistics of masked rows, and the rule that decides which of them are written."""

from fewstep.kernels.confidence.dispatch import commit
from fewstep.kernels.confidence.records import (
    NEVER,
    POLICY_KINDS,
    Candidates,
    CanvasBlock,
    Committed,
    PolicyTensors,
)
from fewstep.kernels.confidence.reference import (
    RowStats,
    fill_after_eos,
    first_true,
    keyed_uniform,
    row_stats,
)

__all__ = [
    "NEVER",
    "POLICY_KINDS",
    "Candidates",
    "CanvasBlock",
    "Committed",
    "PolicyTensors",
    "RowStats",
    "commit",
    "fill_after_eos",
    "first_true",
    "keyed_uniform",
    "row_stats",
]
