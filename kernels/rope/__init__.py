"""Rotary position embedding."""

from fewstep.kernels.rope.reference import apply_rope, rope_and_write, rope_table

__all__ = ["apply_rope", "rope_and_write", "rope_table"]
