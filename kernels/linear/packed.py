"""bfloat16 weights in oneDNN's blocked layout: arranged once instead of in every product.

`torch.nn.functional.linear` rearranges a bfloat16 weight each time it is called, which at the few rows of a denoising
step costs as much as the product. 768 x 2048, one thread of a Xeon with AMX, ms of plain / packed: 16 rows 0.221 / 0.154,
32 rows 0.256 / 0.179, 256 rows 0.676 / 0.532; a gated MLP of three of them with the activation, the product and the
residual sum inside the calls 0.841 / 0.553 at 32 rows.

The operators are those that torch.compile's freezing puts in a graph. They are called directly, because compiling costs
16 to 47 s for each number of rows, and an engine meets a new one at almost every step.
"""

from __future__ import annotations

import torch

# Rows the layout is chosen for; 1, 32 and 256 gave the same times.
_ROWS_HINT = 32


class PackedWeight:
    """W [n, d] for products x Wᵀ + b of bfloat16 rows x [..., d]. Results have bfloat16's rounding, once.

    Args:
        weight: bfloat16 [n, d] on the CPU; later changes to it are not seen.
        bias: [n] or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
        self._bias = None if bias is None else bias.detach()

    @staticmethod
    def supported(weight: torch.Tensor) -> bool:
        """Whether this weight can be packed here, and products with it are then faster."""
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.bfloat16
            and torch._C._has_mkldnn
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b."""
        return self._call(x, "none")

    def swish(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x Wᵀ + b)."""
        return self._call(x, "swish")

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(x Wᵀ + b) · other."""
        return self._binary(x, other, "mul")

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b + other."""
        return self._binary(x, other, "add")

    def _call(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, activation, [], ""
        )
        return out

    def _binary(self, x: torch.Tensor, other: torch.Tensor, operation: str) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._packed, self._bias, operation
        )
        return out
