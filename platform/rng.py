"""Keyed randomness: every random number is a pure function of its key, never of a global stream.

Keys are tuples such as (run seed, step, prompt, sample, position). The mixer is splitmix64's finaliser
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """splitmix64 finaliser of one 64-bit integer."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and strings, stable across processes and Python versions."""
    state = 0
    for part in key:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        state = mix64((state + _GOLDEN + (part & _MASK64)) & _MASK64)
    return state >> 1


def generator(*key: int | str) -> np.random.Generator:
    """A numpy generator of its own for this key."""
    return np.random.Generator(np.random.Philox(derive_seed(*key)))
