"""Block-diffusion attention."""

from fewstep.kernels.attention.reference import attend, visibility

__all__ = ["attend", "visibility"]
