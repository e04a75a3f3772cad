"""Statistics of masked rows, and the rule that decides which of them are written."""

from fewstep.kernels.confidence.reference import (
    RowStats,
    commit,
    fill_after_eos,
    first_true,
    keyed_uniform,
    row_stats,
)

__all__ = ["RowStats", "commit", "fill_after_eos", "first_true", "keyed_uniform", "row_stats"]
