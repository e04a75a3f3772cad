"""Linear layers whose weights lie the way the CPU's matrix unit wants them."""

from fewstep.kernels.linear.packed import PackedWeight
from fewstep.kernels.linear.projection import Projection

__all__ = ["PackedWeight", "Projection"]
