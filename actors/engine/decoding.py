"""Per-slot canvases and the whole-batch step on them: lay out rows, choose, write, decide who is done.

Shape legend: S slots, L context, n running sequences of this step, B block size, R packed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.actors.engine.cache import PackedAttention, SlotCache
from fewstep.actors.engine.request import Request, context_length
from fewstep.kernels.confidence import (
    POLICY_KINDS,
    Candidates,
    CanvasBlock,
    PolicyTensors,
    RowStats,
    commit,
    keyed_uniform,
)
from fewstep.kernels.head import head_statistics
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer

_NEVER = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """What one step did to one sequence, absolute positions.

    Attributes:
        failed: its logits were not usable.
        finished: nothing that counts is left to decide; eos: because an end of sequence came first.
        text_end: every generated position before it is written and is not behind an end of sequence.
        block_end: end of the block that was live in this step.
    """

    failed: bool
    finished: bool
    eos: bool
    text_end: int
    block_end: int


@dataclass(frozen=True)
class Layout:
    """One forward: packed rows and where each sequence's live block lies in them.

    Attributes:
        slots: int64 [n], ordered by number of blocks; order: which running sequence each one is.
        tokens, positions: int64 [1, R]; live_rows, live_positions: int64 [n, B].
        masked: bool [n, B], the live positions still to be written.
    """

    slots: torch.Tensor
    order: list[int]
    tokens: torch.Tensor
    positions: torch.Tensor
    live_rows: torch.Tensor
    live_positions: torch.Tensor
    masked: torch.Tensor
    attention: PackedAttention


class Canvases:
    """State of every slot, as tensors over slots; nothing here is proportional to the vocabulary."""

    def __init__(self, config: ModelConfig, num_slots: int, device: torch.device) -> None:
        self.config = config
        self.cache = SlotCache(config, num_slots, device)
        context = context_length(config)
        self.tokens = torch.full((num_slots, context), config.mask_token_id, device=device)
        self.step_map = torch.full((num_slots, context), -1, dtype=torch.int16, device=device)
        self.confidence = torch.full((num_slots, context), torch.nan, device=device)
        self.logprob = torch.full((num_slots, context), torch.nan, device=device)
        # prompt length, end of the canvas that counts, start of the live block, cached positions, forwards so
        # far, forwards of the live block, and the policy's integers
        whole = torch.zeros((9, num_slots), dtype=torch.int64, device=device)
        self.prompt, self.limit, self.live, self.cached, self.step, self.block_step = whole[:6]
        self.at_least, self.max_block_steps, self.seed = whole[6:]
        self._whole = whole
        self._real = torch.zeros((3, num_slots), device=device)
        self.threshold, self.temperature, self.top_p = self._real
        self.ends = torch.tensor([[config.eos_token_id]], device=device)

    def admit(self, slot: int, request: Request) -> None:
        """Put a request's prompt on a slot's canvas."""
        prompt, policy = request.prompt_ids, request.policy
        size, block = len(prompt), self.config.block_size
        self.tokens[slot] = self.config.mask_token_id
        self.tokens[slot, :size] = torch.tensor(prompt)
        self.step_map[slot] = -1
        self.confidence[slot] = torch.nan
        self.logprob[slot] = torch.nan
        static = policy.kind == "static"
        whole = (size, size + request.max_tokens, size // block * block, 0, 0, 0)
        limits = (policy.tokens_per_step if static else 1, policy.max_steps_per_block or _NEVER, policy.seed)
        real = (torch.inf if static else policy.threshold, policy.temperature, policy.top_p)
        self._whole[:, slot] = torch.tensor(whole + limits)
        self._real[:, slot] = torch.tensor(real)

    def forget_cache(self) -> None:
        """Make the next forward recompute every clean block, as after a change of weights."""
        self.cached.zero_()

    def layout(self, slots: list[int]) -> Layout:
        """Rows of the next forward: each sequence's blocks that are not cached, its live block last."""
        size, device = self.config.block_size, self.tokens.device
        running = torch.tensor(slots, device=device)
        blocks, order = ((self.live - self.cached)[running] // size + 1).sort(stable=True)
        running = running[order]
        cached, live = self.cached[running], self.live[running]
        rows = blocks * size
        ends = rows.cumsum(0)
        owner = torch.repeat_interleave(rows)
        positions = torch.arange(len(owner), device=device) + (cached - ends + rows)[owner]
        tokens = self.tokens[running[owner], positions]
        offset = torch.arange(size, device=device)
        live_rows = (ends - size)[:, None] + offset
        groups, first_row, first = [], 0, 0
        num_blocks, counts = torch.unique_consecutive(blocks, return_counts=True)
        for number, count in zip(num_blocks.tolist(), counts.tolist(), strict=True):
            members = slice(first, first + count)
            groups.append(self.cache.group(first_row, running[members], number, cached[members]))
            first_row, first = first_row + count * number * size, first + count
        return Layout(
            slots=running,
            order=order.tolist(),
            tokens=tokens[None],
            positions=positions[None],
            live_rows=live_rows,
            live_positions=live[:, None] + offset,
            masked=tokens[live_rows] == self.config.mask_token_id,
            attention=PackedAttention(self.cache, groups),
        )

    def decide(
        self, layout: Layout, hidden: torch.Tensor, model: Transformer, sampling: bool
    ) -> list[Outcome]:
        """Choose and write tokens after a forward; outcomes in the layout's order.

        Args:
            hidden: [R, d], final-normed.
            sampling: whether any of the sequences has a temperature above 0.
        """
        slots, masked = layout.slots, layout.masked
        stats = self._statistics(layout, hidden, model, sampling)
        confidence = torch.zeros(masked.shape, device=hidden.device)
        logprob = torch.zeros_like(confidence)
        chosen = torch.zeros(masked.shape, dtype=torch.int64, device=hidden.device)
        confidence[masked], logprob[masked], chosen[masked] = stats.confidence, stats.logprob, stats.token
        failed = ~logprob.isfinite().all(-1)
        last_chance = self.block_step[slots] + 1 >= self.max_block_steps[slots]
        at_least = torch.where(last_chance, masked.shape[1], self.at_least[slots])
        where = (slots[:, None], layout.live_positions)
        size = len(slots)
        done = commit(
            CanvasBlock(
                tokens=self.tokens[where],
                masked=masked,
                generated=layout.live_positions >= self.prompt[slots, None],
                ends=self.ends.expand(size, 1),
                eos_token_id=self.config.eos_token_id,
            ),
            Candidates(chosen, confidence),
            PolicyTensors(
                # A static policy is a threshold that nothing reaches.
                kind=torch.full((size,), POLICY_KINDS["threshold"], dtype=torch.int8, device=hidden.device),
                number=self.threshold[slots],
                at_least=at_least,
                edit_threshold=torch.full((size,), torch.inf, device=hidden.device),
                allow_edit=torch.zeros(size, dtype=torch.bool, device=hidden.device),
            ),
        )
        written, opened = done.opened | done.filled, done.opened
        step = self.step[slots, None].to(torch.int16)
        self.tokens[where] = done.tokens
        self.step_map[where] = torch.where(written, step, self.step_map[where])
        self.confidence[where] = torch.where(opened, confidence, self.confidence[where])
        self.logprob[where] = torch.where(opened, logprob, self.logprob[where])
        return self._advance(slots, failed, done.first_mask, done.first_end)

    def _statistics(
        self, layout: Layout, hidden: torch.Tensor, model: Transformer, sampling: bool
    ) -> RowStats:
        """RowStats of the masked rows, in row-major order of `layout.masked`."""
        slots, masked = layout.slots, layout.masked
        owner = masked.nonzero()[:, 0]
        uniform = None
        if sampling:
            per_row = slots[owner]
            uniform = keyed_uniform(self.seed[per_row], layout.live_positions[masked], self.step[per_row])
        return head_statistics(
            hidden,
            layout.live_rows[masked],
            model.logits,
            self.config.vocab_size,
            self.temperature[slots][owner],
            self.top_p[slots][owner],
            uniform,
        )

    def _advance(
        self, slots: torch.Tensor, failed: torch.Tensor, first_mask: torch.Tensor, first_eos: torch.Tensor
    ) -> list[Outcome]:
        """Move on past full blocks. first_mask, first_eos: int64 [n], index in the live block."""
        size = self.config.block_size
        live = self.live[slots]
        left = self.limit[slots] - live
        end = torch.minimum(first_eos, left)
        finished = first_mask >= end
        report = torch.stack(
            (failed, finished, first_eos < left, live + torch.minimum(first_mask, end), live + size), dim=1
        )
        full = first_mask == size
        self.step[slots] += 1
        self.block_step[slots] = torch.where(full, 0, self.block_step[slots] + 1)
        self.cached[slots] = live
        self.live[slots] = torch.where(full & ~finished, live + size, live)
        return [Outcome(bool(a), bool(b), bool(c), d, e) for a, b, c, d, e in report.tolist()]
