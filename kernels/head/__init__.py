"""The language-model head for masked rows only."""

from fewstep.kernels.head.dispatch import head_confidence

__all__ = ["head_confidence"]
