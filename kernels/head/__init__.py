"""The language-model head for masked rows only."""

from fewstep.kernels.head.reference import head_confidence, head_statistics

__all__ = ["head_confidence", "head_statistics"]
