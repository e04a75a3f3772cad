"""A step whose shapes depend on two counts alone, so that a GPU can repeat it as a graph; on a CPU it runs as it is.

The steady state of a block-causal forward is made of units of one block each. A live block is a unit that sees the cached
positions before it. A finished block whose keys and values go into their page is a unit, too: every layer writes pages
before it attends, so the units behind it read what it has just written, and a merged commit or a short prompt is more
units, not another shape. The live blocks of a dual cache are units with a suffix.

Shape legend: n live units, m units of finished blocks, U = n + m, B the model's block size, P most pages of a sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from fewstep.actors.engine.cache import PackedAttention, PageStore, RowGroup
from fewstep.actors.engine.canvas import (
    BlockReport,
    Canvases,
    Decision,
    LiveBlocks,
    is_last_step,
    reports_of,
)
from fewstep.actors.engine.graphs import ReadBack, StepGraphs
from fewstep.actors.engine.layout import key_of
from fewstep.actors.engine.request import context_length
from fewstep.actors.engine.scheduler import Sequence, Span
from fewstep.kernels.confidence import Candidates, keyed_uniform
from fewstep.kernels.head import head_confidence
from fewstep.kernels.model.transformer import Transformer

# Beyond so many rows of finished blocks (a long prompt) the products take longer than a host takes to launch them.
_MAX_FINISHED_ROWS = 512


class StepShape(NamedTuple):
    """What a graph is captured for: units of live and of finished blocks, and whether a policy asks for entropy."""

    num_live: int
    num_finished: int
    entropy: bool


def live_bucket(count: int) -> int:
    """Powers of two up to 8, then multiples of 8.

    Up to about nine blocks of 32 rows an H100 reads the weights for longer than it multiplies, so padding is free there;
    beyond, every row costs, and a power of two could be twice as many.
    """
    return _power_of_two(count) if count <= 8 else -(-count // 8) * 8


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0


class StepInputs:
    """What changes from step to step, in buffers that stay where they are.

    Attributes:
        numbers: int32 [9, U] on the device: slot, first position, step, last step of its block, page to write (-1 =
            none), and `block_attention`'s prefix, suffix_start, suffix_end, own_len.
        page_table: int32 [U, P] on the device.
    """

    _STEP, _LAST = 2, 3

    def __init__(
        self, num_live: int, num_finished: int, num_pages: int, padding: tuple[int, ...], device: torch.device
    ) -> None:
        self._num_live, self._padding = num_live, np.array(padding, np.int32)
        units, pinned = num_live + num_finished, device.type == "cuda"
        self._host = torch.empty((len(padding), units), dtype=torch.int32, pin_memory=pinned)
        self._host_pages = torch.zeros((units, num_pages), dtype=torch.int32, pin_memory=pinned)
        self.numbers = torch.empty_like(self._host, device=device)
        self.page_table = torch.zeros_like(self._host_pages, device=device)
        self.clear()

    def clear(self) -> None:
        """Padding only: a step on it changes no canvas but the sink's, and no page."""
        self._host.numpy()[:] = self._padding[:, None]
        self._upload()

    def fill(self, spans: list[Span], width: int) -> None:
        """Lay out a forward: live units in the order of their spans, padding, units of finished blocks, padding."""
        numbers, pages = self._host.numpy(), self._host_pages.numpy()
        numbers[:] = self._padding[:, None]
        live, finished = 0, self._num_live
        for span in spans:
            sequence = span.sequence
            owned = sequence.pages
            for start in range(span.first, min(span.end, sequence.live), width):
                page = owned[start // width]
                numbers[:, finished] = (sequence.slot, start, 0, 0, page, start, 0, 0, width)
                pages[finished, : len(owned)] = owned
                finished += 1
            if span.decides:
                suffix = (span.suffix_start, span.suffix_end)
                past, rows = sequence.live, sequence.live_end - sequence.live
                numbers[:, live] = (sequence.slot, past, 0, 0, -1, past, *suffix, rows)
                pages[live, : len(owned)] = owned
                live += 1
        self.page_table.copy_(self._host_pages, non_blocking=True)

    def advance(self, deciding: list[Sequence]) -> None:
        """The step numbers of the forward ahead; everything else stays as `fill` left it."""
        numbers = self._host.numpy()
        for index, sequence in enumerate(deciding):
            numbers[self._STEP, index] = sequence.step
            numbers[self._LAST, index] = is_last_step(sequence)
        self._upload()

    def _upload(self) -> None:
        # The host buffer may be written again: whoever read it has been waited for, a step's report or a capture.
        self.numbers.copy_(self._host, non_blocking=True)


class StaticSteps:
    """Runs the forwards that are made of units; leaves others to the caller.

    A forward is left when a sequence draws from a nucleus (a sort of rows that the data choose), when no sequence
    decides, when a bidirectional model's whole window is computed or a block is wider than the model's, when many rows of a
    prompt are in it, and when logits are shifted: a block's first token is then read from a row of another unit.

    Args:
        capture: repeat steps as CUDA graphs. Not for mixtures of experts: their products are as large as the router says.
    Attributes:
        forwards: those run here.
    """

    def __init__(self, model: Transformer, canvases: Canvases, store: PageStore, capture: bool) -> None:
        config = canvases.config
        self._model, self._canvases, self._store = model, canvases, store
        self._width, self._block_causal = config.block_size, config.attention_kind == "block_causal"
        self._max_finished = max(1, _MAX_FINISHED_ROWS // self._width)
        self._inputs: dict[tuple[int, int], StepInputs] = {}
        self._graphs: StepGraphs[StepShape, Decision] | None = None
        if capture:
            self._graphs = StepGraphs(self.compute, canvases.device)
        self._read_back = ReadBack(canvases.device)
        self._key: tuple[Any, ...] | None = None
        self.forwards = 0

    def run(self, spans: list[Span]) -> tuple[list[Sequence], list[BlockReport]] | None:
        """Deciding sequences and their reports after a forward over these spans; None = not a forward of units."""
        deciding = [span.sequence for span in spans if span.decides]
        num_finished = self._num_finished(spans)
        if not deciding or num_finished is None:
            self._key = None
            return None
        entropy = any(sequence.request.policy.kind == "entropy_bound" for sequence in deciding)
        shape = StepShape(live_bucket(len(deciding)), _power_of_two(num_finished), entropy)
        inputs = self._inputs_for(shape)
        key = key_of(spans)
        if key != self._key:
            inputs.fill(spans, self._width)
        # A forward that writes pages is never repeated, and the next may find its sequences with other pages.
        self._key = None if num_finished else key
        inputs.advance(deciding)
        decision = self.compute(shape) if self._graphs is None else self._graphs.replay(shape)
        rows = self._read_back(decision.report[: len(deciding)])
        self._canvases.forget_geometry()
        self.forwards += 1
        return deciding, reports_of(deciding, rows, decision)

    def compute(self, shape: StepShape) -> Decision:
        """The step on the shape's buffers: nothing is read back and no shape depends on the data."""
        inputs, canvases, width = self._inputs[shape[:2]], self._canvases, self._width
        slots, first, steps, last, page = inputs.numbers[:5].long()
        own_len = inputs.numbers[8].long()[:, None]
        offset = torch.arange(width, device=canvases.device)
        inside = offset < own_len
        # Rows behind a short block have their keys ignored; they need some position the rotary tables have.
        positions = first[:, None] + torch.minimum(offset, own_len - 1)
        columns = torch.where(inside, positions, canvases.sink)
        destination = live_rows = None
        if shape.num_finished:
            destination = torch.where(page[:, None] >= 0, page[:, None] * width + offset, -1).flatten()
            live_rows = torch.arange(shape.num_live * width, device=canvases.device)
        group = RowGroup(0, width, width, inputs.page_table, inputs.numbers[5:], None)
        hidden = self._model(
            canvases.tokens[slots[:, None], columns].view(1, -1),
            positions.view(1, -1),
            PackedAttention(self._store, [group], destination),
            live_rows,
        )[0]
        decides = slice(0, shape.num_live)
        live = canvases.live_blocks(slots[decides], columns[decides], inside[decides], editing=True)
        candidates, logprob = self._candidates(live, hidden, steps[decides], shape.entropy)
        return canvases.write(live, candidates, logprob, steps[decides], last[decides] != 0)

    def _candidates(
        self, live: LiveBlocks, hidden: torch.Tensor, steps: torch.Tensor, entropy: bool
    ) -> tuple[Candidates, torch.Tensor]:
        """As `Canvases` makes them of the active rows, from all rows [n·B, d]: which are active only the device knows."""
        canvases, model, shape = self._canvases, self._model, live.active.shape
        seed, positions = canvases.seed[live.slots, None], live.where[1]
        stats = head_confidence(
            hidden,
            torch.arange(len(hidden), device=hidden.device),
            model.head_weight,
            mask_token_id=canvases.config.mask_token_id,
            temperature=canvases.temperature[live.slots, None].expand(shape).reshape(-1),
            top_p=torch.ones(len(hidden), device=hidden.device),
            uniform=keyed_uniform(seed, positions, steps[:, None]).view(-1),
            entropy=entropy,
            nucleus=False,
            packed=model.packed_head,
        )
        token = torch.where(live.active, stats.token.view(shape), live.block.tokens)
        confidence, logprob = (
            torch.where(live.active, value.view(shape), 0.0) for value in (stats.confidence, stats.logprob)
        )
        spread = None if stats.entropy is None else stats.entropy.view(shape)
        return Candidates(token, confidence, spread), logprob

    def _num_finished(self, spans: list[Span]) -> int | None:
        """Units of finished blocks; None = the forward is not made of units."""
        count = 0
        if self._canvases.config.logit_shift:
            return None
        for span in spans:
            sequence, policy = span.sequence, span.sequence.request.policy
            if policy.top_p < 1.0 and policy.temperature > 0.0:
                return None
            finished = min(span.end, sequence.live)
            if span.first < finished:
                if not self._block_causal or span.keep != finished:
                    return None
                count += (finished - span.first) // self._width
            elif span.end != sequence.live_end or span.end - span.first > self._width:
                return None
        return count if count <= self._max_finished else None

    def _inputs_for(self, shape: StepShape) -> StepInputs:
        inputs = self._inputs.get(shape[:2])
        if inputs is None:
            canvases = self._canvases
            num_pages = -(-context_length(canvases.config) // self._store.page_size)
            padding = (canvases.sink_slot, 0, 0, 0, -1, 0, 0, 0, self._width)
            inputs = StepInputs(shape.num_live, shape.num_finished, num_pages, padding, canvases.device)
            self._inputs[shape[:2]] = inputs
        if self._graphs is not None and shape not in self._graphs:
            inputs.clear()
            self._graphs.capture(shape)
            self._key = None
        return inputs
