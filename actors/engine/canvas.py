"""Per-slot canvases and the whole-batch step on them: lay out rows, choose, write, say what became of each block.

Shape legend: S slots, L context, n sequences of a forward, m of them deciding, W widest live block of those, R packed
rows, A rows that go through the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.actors.engine.cache import PackedAttention, PageStore
from fewstep.actors.engine.layout import Geometry, geometry_of, key_of
from fewstep.actors.engine.request import MAX_STOP_IDS, Request, context_length
from fewstep.actors.engine.scheduler import Overwritten, Sequence, Span
from fewstep.kernels.confidence import (
    POLICY_KINDS,
    Candidates,
    CanvasBlock,
    Committed,
    PolicyTensors,
    commit,
    keyed_uniform,
)
from fewstep.kernels.head import head_confidence
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer

_NEVER = 1 << 30


@dataclass(frozen=True)
class LiveBlocks:
    """The live blocks of the sequences that decide in a forward, as they stand before it.

    Attributes:
        sequences: m of them; slots: int64 [m].
        where: (slots [m, 1], positions [m, W]) into the canvases.
        block: their tokens and masks; active: bool [m, W], what goes through the head.
        active_rows: int64 [A], packed rows of the active positions, in row-major order of `active`.
    """

    sequences: list[Sequence]
    slots: torch.Tensor
    where: tuple[torch.Tensor, torch.Tensor]
    block: CanvasBlock
    active: torch.Tensor
    active_rows: torch.Tensor


@dataclass(frozen=True)
class Forward:
    """What the model is given: int64 [1, R] tokens and positions, who sees whom, and the live blocks among the rows."""

    geometry: Geometry
    tokens: torch.Tensor
    positions: torch.Tensor
    attention: PackedAttention
    live: LiveBlocks


class BlockReport(NamedTuple):
    """What a forward did to a live block.

    Attributes:
        failed: its logits were not usable.
        first_mask: index of the first position still to be written, the block's width if there is none.
        first_end: index of the first end of sequence, a huge number if there is none.
        num_edits: tokens replaced.
        tokens: the live block, W of them.
    """

    failed: bool
    first_mask: int
    first_end: int
    num_edits: int
    tokens: list[int]


class Canvases:
    """State of every slot, as tensors over slots; nothing here is proportional to the vocabulary."""

    def __init__(self, config: ModelConfig, num_slots: int, store: PageStore, device: torch.device) -> None:
        self.config, self.store, self.device = config, store, device
        self._geometry: Geometry | None = None
        columns = context_length(config) + 1  # the last one is the sink
        self.tokens = torch.full((num_slots, columns), config.mask_token_id, device=device)
        self.step_map = torch.full((num_slots, columns), -1, dtype=torch.int16, device=device)
        self.confidence = torch.full((num_slots, columns), torch.nan, device=device)
        self.logprob = torch.full((num_slots, columns), torch.nan, device=device)
        self.kind = torch.zeros(num_slots, dtype=torch.int8, device=device)
        self._whole = torch.zeros((4, num_slots), dtype=torch.int64, device=device)
        # first position the request writes, the first it does not, masks opened in any case, seed
        self.start, self.stop, self.at_least, self.seed = self._whole
        self._real = torch.zeros((4, num_slots), device=device)
        self.number, self.edit_threshold, self.temperature, self.top_p = self._real
        self.ends = torch.full((num_slots, MAX_STOP_IDS + 1), -1, device=device)

    def admit(self, slot: int, request: Request) -> None:
        """Put a request's prompt and suffix on a slot's canvas."""
        prompt, suffix, policy = request.prompt_ids, request.suffix_ids, request.policy
        first, behind = len(prompt), len(prompt) + request.max_tokens
        self.tokens[slot] = self.config.mask_token_id
        self.tokens[slot, :first] = torch.tensor(prompt)
        if suffix:
            self.tokens[slot, behind : behind + len(suffix)] = torch.tensor(suffix)
        self.step_map[slot] = -1
        self.confidence[slot] = torch.nan
        self.logprob[slot] = torch.nan
        self.kind[slot] = POLICY_KINDS[policy.kind]
        # A block-causal model also writes what lies in the last block behind the limit: it was trained on whole blocks.
        fixed_end = bool(suffix) or self.config.attention_kind == "bidirectional"
        at_least = policy.tokens_per_step if policy.kind == "static" else 1
        whole = (first, behind if fixed_end else _NEVER, at_least, policy.seed)
        edit = torch.inf if policy.edit_threshold is None else policy.edit_threshold
        self._whole[:, slot] = torch.tensor(whole)
        self._real[:, slot] = torch.tensor((policy.number, edit, policy.temperature, policy.top_p))
        self.ends[slot] = -1
        if not request.ignore_eos:
            ends = (self.config.eos_token_id, *request.stop_ids)
            self.ends[slot, : len(ends)] = torch.tensor(ends)

    def forward(self, spans: list[Span]) -> Forward:
        """The next forward, from the spans and the canvases as they stand."""
        geometry = self._geometry
        if geometry is None or not geometry.reusable or geometry.key != key_of(spans):
            geometry = geometry_of(
                spans, self.store, self.tokens.shape[1] - 1, int(self.config.logit_shift), self.device
            )
            self._geometry = geometry
        return Forward(
            geometry,
            self.tokens[geometry.slots, geometry.positions][None],
            geometry.positions[None],
            PackedAttention(self.store, geometry.groups, geometry.destination, geometry.stale),
            self._live(geometry),
        )

    def _live(self, geometry: Geometry) -> LiveBlocks:
        slots, positions = geometry.live_slots, geometry.live_positions
        where = (slots[:, None], positions)
        tokens = self.tokens[where]
        generated = (positions >= self.start[slots, None]) & (positions < self.stop[slots, None])
        if geometry.inside is not None:
            generated &= geometry.inside
        masked = generated & (tokens == self.config.mask_token_id)
        ends, active = self.ends[slots], masked
        if any(sequence.edits_block for sequence in geometry.deciding):
            active = masked | self._editable(slots, tokens, generated, ends)
        block = CanvasBlock(tokens, masked, generated, ends, self.config.eos_token_id)
        return LiveBlocks(geometry.deciding, slots, where, block, active, geometry.live_rows[active])

    def _editable(
        self, slots: torch.Tensor, tokens: torch.Tensor, generated: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        """bool [m, W]: positions of sequences that edit, up to and including the first end of sequence."""
        is_end = generated & (tokens[:, :, None] == ends[:, None]).any(-1)
        behind = is_end.cumsum(-1) - is_end.long() > 0
        editable: torch.Tensor = generated & ~behind & self.edit_threshold[slots, None].isfinite()
        return editable

    def decide(self, live: LiveBlocks, hidden: torch.Tensor, model: Transformer) -> list[BlockReport]:
        """Choose and write tokens after a forward; reports in the order of `live.sequences`.

        Args:
            hidden: [A, d], final-normed, of the active rows.
        """
        candidates, logprob = self._candidates(live, hidden, model)
        done = commit(live.block, candidates, self._policies(live))
        chosen, written = done.opened | done.edited, done.opened | done.edited | done.filled
        if any(sequence.edits_block for sequence in live.sequences):
            self._log_edits(live, done)
        step = self._tensor(np.array([[sequence.step] for sequence in live.sequences], np.int16))
        where = live.where
        self.tokens[where] = done.tokens
        self.step_map[where] = torch.where(written, step, self.step_map[where])
        for store, value in ((self.confidence, candidates.confidence), (self.logprob, logprob)):
            store[where] = torch.where(chosen, value, store[where])
        failed = ~logprob.isfinite().all(-1)
        numbers = torch.stack((failed.long(), done.first_mask, done.first_end, done.edited.sum(-1)), dim=1)
        rows = torch.cat((numbers, done.tokens), dim=1).tolist()
        return [BlockReport(bool(row[0]), row[1], row[2], row[3], row[4:]) for row in rows]

    def _candidates(
        self, live: LiveBlocks, hidden: torch.Tensor, model: Transformer
    ) -> tuple[Candidates, torch.Tensor]:
        """What every active position would write, and its log-probability float32 [m, W]."""
        active, policies = live.active, [sequence.request.policy for sequence in live.sequences]
        owner = active.nonzero()[:, 0]
        slots = live.slots[owner]
        uniform = None
        if any(policy.temperature > 0 for policy in policies):
            steps = self._tensor(np.array([sequence.step for sequence in live.sequences], np.int64))
            uniform = keyed_uniform(self.seed[slots], live.where[1][active], steps[owner])
        stats = head_confidence(
            hidden,
            torch.arange(len(hidden), device=hidden.device),
            model.head_weight,
            mask_token_id=self.config.mask_token_id,
            temperature=self.temperature[slots],
            top_p=self.top_p[slots],
            uniform=uniform,
            entropy=any(policy.kind == "entropy_bound" for policy in policies),
            nucleus=any(policy.top_p < 1.0 for policy in policies),
            packed=model.packed_head,
        )
        dense = torch.zeros((3, *active.shape), device=hidden.device)
        dense[0, active], dense[1, active] = stats.confidence, stats.logprob
        if stats.entropy is not None:
            dense[2, active] = stats.entropy
        # Where the head was not asked the candidate is what stands there, so nothing is edited.
        token = live.block.tokens.clone()
        token[active] = stats.token
        return Candidates(token, dense[0], dense[2] if stats.entropy is not None else None), dense[1]

    def _policies(self, live: LiveBlocks) -> PolicyTensors:
        slots, num = live.slots, len(live.sequences)
        at_least = self.at_least[slots]
        limits = [sequence.request.policy.max_steps_per_block for sequence in live.sequences]
        last = [
            limit is not None and sequence.block_step + 1 >= limit
            for limit, sequence in zip(limits, live.sequences, strict=True)
        ]
        if any(last):
            at_least = torch.where(self._tensor(np.array(last)), live.active.shape[1], at_least)
        everyone = torch.ones(num, dtype=torch.bool, device=self.device)
        return PolicyTensors(
            self.kind[slots], self.number[slots], at_least, self.edit_threshold[slots], everyone
        )

    def _log_edits(self, live: LiveBlocks, done: Committed) -> None:
        """Remember what is about to be written over."""
        where = live.where
        old = (live.block.tokens, self.step_map[where], self.logprob[where])
        for row, column in done.edited.nonzero().tolist():
            sequence = live.sequences[row]
            position = sequence.live + column - len(sequence.request.prompt_ids)
            token, step, logprob = (values[row, column].item() for values in old)
            sequence.edits.append(Overwritten(position, int(step), int(token), float(logprob)))

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
