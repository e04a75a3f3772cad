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
        slots: int64 [m]; where: (slots [m, 1], positions [m, W]) into the canvases.
        block: their tokens and masks; active: bool [m, W], what the head is asked about.
    """

    slots: torch.Tensor
    where: tuple[torch.Tensor, torch.Tensor]
    block: CanvasBlock
    active: torch.Tensor


@dataclass(frozen=True)
class Decision:
    """What a forward did to the live blocks, on the device.

    Attributes:
        report: int64 [m, 4 + W], the numbers of a `BlockReport` in its order.
        edited: bool [m, W], tokens that were replaced; tokens, steps, logprobs: [m, W], what stood there before.
        proposed: int64 [m, W], what the forward would have written everywhere; read back for watched requests only.
    """

    report: torch.Tensor
    edited: torch.Tensor
    tokens: torch.Tensor
    steps: torch.Tensor
    logprobs: torch.Tensor
    proposed: torch.Tensor


@dataclass(frozen=True)
class Forward:
    """What the model is given: int64 [1, R] tokens and positions, who sees whom, and the live blocks among the rows.

    Attributes:
        asked: (row, column) of the active positions of `live`, int64 [A] each, in row-major order.
        rows: int64 [A], their packed rows.
    """

    geometry: Geometry
    tokens: torch.Tensor
    positions: torch.Tensor
    attention: PackedAttention
    live: LiveBlocks
    asked: tuple[torch.Tensor, torch.Tensor]
    rows: torch.Tensor


class BlockReport(NamedTuple):
    """What a forward did to a live block.

    Attributes:
        failed: its logits were not usable.
        first_mask: index of the first position still to be written, the block's width if there is none.
        first_end: index of the first end of sequence, a huge number if there is none.
        num_edits: tokens replaced.
        tokens: the live block, W of them.
        proposed: what the forward would have written at each of them; empty unless a request of the forward is watched.
    """

    failed: bool
    first_mask: int
    first_end: int
    num_edits: int
    tokens: list[int]
    proposed: tuple[int, ...] = ()


class Canvases:
    """State of every slot, as tensors over slots; nothing here is proportional to the vocabulary.

    Behind the slots of requests lies one more, whose canvas has nothing to write: `sink_slot`, where padding goes. The
    last column of every canvas, `sink`, is for what stands behind a block's end.
    """

    def __init__(self, config: ModelConfig, num_slots: int, store: PageStore, device: torch.device) -> None:
        self.config, self.store, self.device = config, store, device
        self._geometry: Geometry | None = None
        self.sink_slot, self.sink = num_slots, context_length(config)
        num_slots, columns = num_slots + 1, self.sink + 1
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
            shift = int(self.config.logit_shift)
            geometry = geometry_of(spans, self.store, self.sink, shift, self.device)
            self._geometry = geometry
        editing = any(sequence.edits_block for sequence in geometry.deciding)
        live = self.live_blocks(geometry.live_slots, geometry.live_positions, geometry.inside, editing)
        # Looked up once: on a GPU every use of a mask as an index waits for the count.
        row, column = live.active.nonzero().unbind(1)
        return Forward(
            geometry,
            self.tokens[geometry.slots, geometry.positions][None],
            geometry.positions[None],
            PackedAttention(self.store, geometry.groups, geometry.destination, geometry.stale),
            live,
            (row, column),
            geometry.live_rows[row, column],
        )

    def forget_geometry(self) -> None:
        """The next forward is not the one behind the last that `forward` was asked for."""
        self._geometry = None

    def live_blocks(
        self, slots: torch.Tensor, positions: torch.Tensor, inside: torch.Tensor | None, editing: bool
    ) -> LiveBlocks:
        """Live blocks as they stand.

        Args:
            slots: int64 [m]; positions: int64 [m, W], the sink behind a block's end; inside: bool [m, W], not behind
                it, None = all are.
            editing: whether a sequence among them may edit.
        """
        where = (slots[:, None], positions)
        tokens = self.tokens[where]
        generated = (positions >= self.start[slots, None]) & (positions < self.stop[slots, None])
        if inside is not None:
            generated &= inside
        masked = generated & (tokens == self.config.mask_token_id)
        ends, active = self.ends[slots], masked
        if editing:
            active = masked | self._editable(slots, tokens, generated, ends)
        block = CanvasBlock(tokens, masked, generated, ends, self.config.eos_token_id)
        return LiveBlocks(slots, where, block, active)

    def _editable(
        self, slots: torch.Tensor, tokens: torch.Tensor, generated: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        """bool [m, W]: positions of sequences that edit, up to and including the first end of sequence."""
        is_end = generated & (tokens[:, :, None] == ends[:, None]).any(-1)
        behind = is_end.cumsum(-1) - is_end.long() > 0
        editable: torch.Tensor = generated & ~behind & self.edit_threshold[slots, None].isfinite()
        return editable

    def decide(self, forward: Forward, hidden: torch.Tensor, model: Transformer) -> list[BlockReport]:
        """Choose and write tokens after a forward; reports in the order of its geometry's `deciding`.

        Args:
            hidden: [A, d], final-normed, of `forward.rows`.
        """
        sequences, live = forward.geometry.deciding, forward.live
        candidates, logprob = self._candidates(forward, hidden, model)
        steps = self._tensor(np.array([sequence.step for sequence in sequences], np.int64))
        last = [is_last_step(sequence) for sequence in sequences]
        decision = self.write(
            live, candidates, logprob, steps, self._tensor(np.array(last)) if any(last) else None
        )
        return reports_of(sequences, decision.report.tolist(), decision)

    def write(
        self,
        live: LiveBlocks,
        candidates: Candidates,
        logprob: torch.Tensor,
        steps: torch.Tensor,
        last: torch.Tensor | None,
    ) -> Decision:
        """Commit candidates to the canvases. No shape depends on the data and nothing is read back.

        Args:
            candidates, logprob: [m, W], what every active position would write; where none is active the token that
                stands there and 0.
            steps: int64 [m], deciding forwards before this one; last: bool [m], open all that is masked, None = nobody.
        """
        where, slots = live.where, live.slots
        at_least = self.at_least[slots]
        if last is not None:
            at_least = torch.where(last, live.active.shape[1], at_least)
        edits = torch.ones_like(slots, dtype=torch.bool)
        policy = PolicyTensors(
            self.kind[slots], self.number[slots], at_least, self.edit_threshold[slots], edits
        )
        done = commit(live.block, candidates, policy)
        chosen, written = done.opened | done.edited, done.opened | done.edited | done.filled
        old_steps, old_logprobs = self.step_map[where], self.logprob[where]
        self.tokens[where] = done.tokens
        self.step_map[where] = torch.where(written, steps[:, None].to(torch.int16), old_steps)
        self.logprob[where] = torch.where(chosen, logprob, old_logprobs)
        self.confidence[where] = torch.where(chosen, candidates.confidence, self.confidence[where])
        failed = ~logprob.isfinite().all(-1)
        numbers = torch.stack((failed.long(), done.first_mask, done.first_end, done.edited.sum(-1)), dim=1)
        report = torch.cat((numbers, done.tokens), dim=1)
        return Decision(report, done.edited, live.block.tokens, old_steps, old_logprobs, candidates.token)

    def _candidates(
        self, forward: Forward, hidden: torch.Tensor, model: Transformer
    ) -> tuple[Candidates, torch.Tensor]:
        """What every active position would write, and its log-probability float32 [m, W]."""
        live, sequences = forward.live, forward.geometry.deciding
        policies = [sequence.request.policy for sequence in sequences]
        owner, column = forward.asked
        slots = live.slots[owner]
        uniform = None
        if any(policy.temperature > 0 for policy in policies):
            steps = self._tensor(np.array([sequence.step for sequence in sequences], np.int64))
            uniform = keyed_uniform(self.seed[slots], live.where[1][owner, column], steps[owner])
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
        dense = torch.zeros((3, *live.active.shape), device=hidden.device)
        dense[0, owner, column], dense[1, owner, column] = stats.confidence, stats.logprob
        if stats.entropy is not None:
            dense[2, owner, column] = stats.entropy
        # Where the head was not asked the candidate is what stands there, so nothing is edited.
        token = live.block.tokens.index_put((owner, column), stats.token)
        return Candidates(token, dense[0], dense[2] if stats.entropy is not None else None), dense[1]

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def is_last_step(sequence: Sequence) -> bool:
    """Whether the step ahead is the last that a sequence's policy allows for its block."""
    limit = sequence.request.policy.max_steps_per_block
    return limit is not None and sequence.block_step + 1 >= limit


def reports_of(sequences: list[Sequence], rows: list[list[int]], decision: Decision) -> list[BlockReport]:
    """Reports of the first sequences of a decision; what was written over is noted in each sequence.

    Args:
        rows: of `decision.report`, on the host.
    """
    reports = [BlockReport(bool(row[0]), row[1], row[2], row[3], row[4:]) for row in rows]
    if any(report.num_edits for report in reports):
        _log_edits(sequences, decision)
    if any(sequence.request.watch for sequence in sequences):
        proposed = decision.proposed[: len(reports)].tolist()
        reports = [
            report._replace(proposed=tuple(row)) for report, row in zip(reports, proposed, strict=True)
        ]
    return reports


def _log_edits(sequences: list[Sequence], decision: Decision) -> None:
    for row, column in decision.edited.nonzero().tolist():
        sequence = sequences[row]
        position = sequence.live + column - len(sequence.request.prompt_ids)
        old = (values[row, column].item() for values in (decision.tokens, decision.steps, decision.logprobs))
        token, step, logprob = old
        sequence.edits.append(Overwritten(position, int(step), int(token), float(logprob)))
