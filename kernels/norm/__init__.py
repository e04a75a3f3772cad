"""Root-mean-square normalisation."""

from fewstep.kernels.norm.reference import rms_norm

__all__ = ["rms_norm"]
