"""Block-diffusion attention: over the rows of a forward (training), and over a paged cache (engine)."""

from fewstep.kernels.attention.dispatch import block_attention
from fewstep.kernels.attention.gathered import GatherPlan
from fewstep.kernels.attention.reference import attend, visibility

__all__ = ["GatherPlan", "attend", "block_attention", "visibility"]
