"""The language-model head for masked rows only."""

from fewstep.kernels.head.dispatch import head_confidence
from fewstep.kernels.head.tiled import pack_head

__all__ = ["head_confidence", "pack_head"]
