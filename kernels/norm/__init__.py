"""Root-mean-square normalisation."""

from fewstep.kernels.norm.dispatch import rms_norm

__all__ = ["rms_norm"]
