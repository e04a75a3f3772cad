"""torch's Linear with what surrounds it in a transformer, and a packed weight for inference where that pays."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fewstep.kernels.linear.packed import PackedWeight


class Projection(nn.Linear):
    """Parameters and results of `nn.Linear`; after `pack` products run on a packed copy, without a gradient.

    Attributes:
        added: what is added to x Wᵀ + b, a function of x, while an adapter is trained (`kernels/model/lora.py`).
    """

    added: Callable[[torch.Tensor], torch.Tensor] | None = None
    _packed: PackedWeight | None = None

    def pack(self) -> None:
        """Take the weights as they are now for all later calls; where packing is not supported nothing changes."""
        self._packed = PackedWeight(self.weight, self.bias) if PackedWeight.supported(self.weight) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x) if self._packed is None else self._packed.linear(x)

    def swish(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x Wᵀ + b)."""
        return F.silu(self._product(x)) if self._packed is None else self._packed.swish(x)

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(x Wᵀ + b) · other."""
        return other * self._product(x) if self._packed is None else self._packed.times(x, other)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b + other."""
        return other + self._product(x) if self._packed is None else self._packed.plus(x, other)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if self.added is None else out + self.added(x)
