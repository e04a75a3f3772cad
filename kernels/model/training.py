"""The transformer as a training module: rows in, log-probabilities of the targets out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fewstep.kernels.attention import attend, visibility
from fewstep.kernels.loss import holds_logits, linear_logprob, target_logprobs
from fewstep.kernels.model.config import NO_TOKEN, Precision
from fewstep.kernels.model.lora import Lora
from fewstep.kernels.model.transformer import Attention, Transformer
from fewstep.kernels.rope import apply_rope
from fewstep.kernels.rows import NO_TARGET, RowBatch


@dataclass(frozen=True)
class RowTensors:
    """A RowBatch on the device, with its target rows picked out (m of them, in row order)."""

    tokens: torch.Tensor
    positions: torch.Tensor
    copies: torch.Tensor
    documents: torch.Tensor
    target_rows: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    extras: dict[str, torch.Tensor]

    @classmethod
    def of(cls, batch: RowBatch) -> RowTensors:
        targets = torch.from_numpy(batch.targets).flatten()
        rows = (targets != NO_TARGET).nonzero().squeeze(1)
        return cls(
            tokens=torch.from_numpy(batch.tokens),
            positions=torch.from_numpy(batch.positions),
            copies=torch.from_numpy(batch.copies),
            documents=torch.from_numpy(batch.documents),
            target_rows=rows,
            targets=targets[rows],
            weights=torch.from_numpy(batch.weights).flatten()[rows],
            extras={name: torch.from_numpy(array).flatten()[rows] for name, array in batch.extras.items()},
        )


class TrainingModel(nn.Module):
    """Wraps a Transformer; forward gives (logprob [m], entropy [m]) of the target rows.

    Args:
        precision: `bf16` runs the matrix products in bfloat16 over float32 weights.
        compiled: run through torch.compile; one compilation serves every batch shape.
        adapter: attached to the transformer; a part of this module's parameters.
    """

    def __init__(
        self,
        transformer: Transformer,
        precision: Precision = "fp32",
        compiled: bool = False,
        adapter: Lora | None = None,
    ) -> None:
        super().__init__()
        self.transformer, self.adapter = transformer, adapter
        self.precision = precision
        # 32 samples of 190 rows, 0.86 M parameters, one core with AMX: eager fp32 600 ms, compiled bf16 275 ms.
        self._run = torch.compile(self._logprobs, dynamic=True) if compiled else self._logprobs
        # A vocabulary cut into chunks is a loop that a compiler would unroll, so it stays outside.
        self._hidden = torch.compile(self._target_hidden, dynamic=True) if compiled else self._target_hidden

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        copies: torch.Tensor,
        target_rows: torch.Tensor,
        targets: torch.Tensor,
        block_size: int,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments as in `RowTensors`; `block_size` as for `visibility` (`ModelConfig.sees_block` unless warming up);
        `documents` = None says that nothing is packed."""
        visible = visibility(positions, copies, block_size, documents)
        config = self.transformer.config
        if config.logit_shift:
            target_rows = rows_before(positions, copies, target_rows, block_size, documents)
        if tokens.is_cpu and holds_logits(len(targets), config.vocab_size):
            return self._run(tokens, positions, visible, target_rows, targets)  # type: ignore[no-any-return]
        hidden = self._hidden(tokens, positions, visible, target_rows)
        kind = torch.bfloat16 if self.precision == "bf16" else hidden.dtype
        weight = self.transformer.head_weight.to(kind)
        mask = None if config.mask_token_id == NO_TOKEN else config.mask_token_id
        return linear_logprob(hidden.to(kind), weight, targets, mask_token_id=mask)

    def _target_hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        target_rows: torch.Tensor,
    ) -> torch.Tensor:
        with self._autocast():
            hidden = self.transformer(tokens, positions, _float32_attention(visible))
        return hidden.flatten(0, 1)[target_rows]  # type: ignore[no-any-return]

    def _logprobs(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        target_rows: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self._target_hidden(tokens, positions, visible, target_rows)
        with self._autocast():
            logits = self.transformer.logits(hidden)
        return target_logprobs(logits, targets)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


def rows_before(
    positions: torch.Tensor,
    copies: torch.Tensor,
    target_rows: torch.Tensor,
    block_size: int,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows that predict the targets of a model with shifted logits: those one position to the left.

    Inside a block that is the neighbour in the same copy. The first token of a block is predicted by the clean last row
    of the block before, which is what decoding does: that block is finished by then. Position 0 has no such row and
    must not be a target.

    Args:
        positions, copies: int64 [N, R], clean rows first and in order (see `SampleRows`); target_rows: int64 [m], into
            the flattened rows; documents: as for `visibility`.
    Returns:
        int64 [m], into the flattened rows.
    """
    flat_position, flat_copy = positions.flatten(), copies.flatten()
    left = target_rows - 1
    wanted = flat_position[target_rows] - 1
    same_copy = (flat_copy[left] == flat_copy[target_rows]) & (flat_position[left] == wanted)
    same_block = wanted // block_size == (wanted + 1) // block_size
    clean = target_rows // positions.shape[1] * positions.shape[1] + wanted
    if documents is not None:
        clean = clean + _first_rows(positions, copies, documents, target_rows)
        same_copy &= documents.flatten()[left] == documents.flatten()[target_rows]
    return torch.where(same_copy & same_block, left, clean)


def _first_rows(
    positions: torch.Tensor, copies: torch.Tensor, documents: torch.Tensor, target_rows: torch.Tensor
) -> torch.Tensor:
    """Where in its sample's rows the first clean row of each target's document lies, int64 [m]."""
    first = positions.new_zeros(len(positions), int(documents.max()) + 1)
    sample, row = ((positions == 0) & (copies == 0)).nonzero(as_tuple=True)
    first[sample, documents[sample, row]] = row
    return first[target_rows // positions.shape[1], documents.flatten()[target_rows]]


def _float32_attention(visible: torch.Tensor) -> Attention:
    """Masked attention in float32 whatever the autocast: the CPU's bf16 flash kernel with a mask took 60 ms where
    float32 took 20 ms (32 sequences of 190 rows, 4 heads of 32, one core)."""

    def attention(
        _layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            q, k = apply_rope(q.float(), cos, sin), apply_rope(k.float(), cos, sin)
            return attend(q, k, v.float(), visible)

    return attention
