"""Rotary position embedding, and the write of final keys and values into their pages."""

from fewstep.kernels.rope.dispatch import apply_rope, rope_and_write
from fewstep.kernels.rope.reference import rope_table

__all__ = ["apply_rope", "rope_and_write", "rope_table"]
