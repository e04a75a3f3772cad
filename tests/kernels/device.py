"""Where kernel tests run, and memory that betrays an output nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Without a GPU the root conftest has turned Triton's interpreter on.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are NaN, or the largest integer, until written: torch's own debugging fill."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def repair_bfloat16_products() -> None:
    """Make the interpreter's `tl.dot` multiply bfloat16 numbers; it multiplies the integers it keeps them in.

    Products of bfloat16 numbers are exact in float32, where tensor cores add them up, so converting first is the same.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    broken = InterpreterBuilder.create_dot

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: object
    ) -> TensorHandle:
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return broken(self, a, b, d, *rest)

    InterpreterBuilder.create_dot = create_dot
