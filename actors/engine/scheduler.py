"""Who takes part in the next forward, with which rows, and whose pages pay for it. Knows no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from fewstep.actors.engine.pages import PagePool
from fewstep.actors.engine.request import Request
from fewstep.actors.engine.text import TextStream
from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.records import WeightVersion


@dataclass(frozen=True)
class Overwritten:
    """A token that editing replaced: canvas position, the step it had been written at, its log-probability then."""

    position: int
    step: int
    token: int
    logprob: float


@dataclass(eq=False)
class Sequence:
    """A request that holds a slot.

    Attributes:
        ids: tokens before the live block, all of them final.
        live, live_end: the live block's positions; end: first position behind everything generated and counted;
        window: first position behind the canvas of a bidirectional model.
        cached: positions from 0 whose keys and values are in `pages`; node: names them for the block behind.
        refreshed: whether an approximate cache holds this block's surroundings; full: whether the live block had no
            mask left when it was last looked at; first_masked: whether its first position may be without a token.
        step: forwards that decided something; block_step, edit_step: those of this block, and those of them that found
            no mask left; forwards: all forwards, those included that only wrote pages.
        stream: None where nobody reads along and no stop string asks for it: no text is made then.
    """

    request: Request
    slot: int
    first_version: WeightVersion
    stream: TextStream | None
    ids: list[int]
    live: int
    live_end: int
    end: int
    window: int
    text_end: int
    root: Hashable
    node: Hashable
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    refreshed: bool = False
    full: bool = False
    first_masked: bool = True
    step: int = 0
    block_step: int = 0
    edit_step: int = 0
    forwards: int = 0
    num_tokens: int = 0
    edits: list[Overwritten] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)

    @property
    def bound(self) -> int:
        """Where live blocks end at the latest: before the suffix of a bidirectional model's window, which has whole
        blocks only by chance; far away for a block-causal model, whose blocks are whole."""
        return self.window - len(self.request.suffix_ids)

    @property
    def edits_block(self) -> bool:
        """Whether written tokens may still change."""
        return self.request.policy.edit_threshold is not None


@dataclass(frozen=True)
class Span:
    """The rows a sequence contributes to one forward: positions first to end - 1.

    Attributes:
        decides: the live block is among them.
        keep: rows at positions before it go into the pages.
        prefix, suffix_start, suffix_end: cached positions the rows see: below prefix, and from suffix_start to
            suffix_end - 1.
        own_block: rows i and j see each other iff j // own_block <= i // own_block.
        refreshes: the kept rows replace stale ones of an approximate cache.
    """

    sequence: Sequence
    first: int
    end: int
    own_block: int
    decides: bool = True
    keep: int = 0
    prefix: int = 0
    suffix_start: int = 0
    suffix_end: int = 0
    refreshes: bool = False


class Scheduler:
    """First come, first served; requests join and leave between any two forwards.

    Args:
        max_sequences: slots.
        merged_commit: a finished block's keys and values are written by the first forward of the next block; without it
            by a forward of their own.
        max_rows: rows of finished and prompt blocks that a sequence writes in one forward, at least a block; None = all.
    """

    def __init__(
        self,
        config: ModelConfig,
        pool: PagePool,
        page_size: int,
        max_sequences: int,
        merged_commit: bool,
        max_rows: int | None,
    ) -> None:
        self.config, self.pool, self.page_size = config, pool, page_size
        self.block_causal = config.attention_kind == "block_causal"
        self.merged_commit, self.max_rows = merged_commit, max_rows
        self.free_slots = list(range(max_sequences - 1, -1, -1))
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Sequence] = {}
        self.preemptions = 0

    def enqueue(self, request: Request) -> None:
        """Let a request wait behind all of its priority and above."""
        index = len(self.waiting)
        while index and self.waiting[index - 1].priority < request.priority:
            index -= 1
        self.waiting.insert(index, request)

    def join(self, sequence: Sequence) -> None:
        self.running[sequence.request.request_id] = sequence

    def leave(self, sequence: Sequence) -> None:
        """Free the slot and the pages of a sequence."""
        self.drop_cache(sequence)
        self.free_slots.append(sequence.slot)
        del self.running[sequence.request.request_id]

    def drop_cache(self, sequence: Sequence) -> None:
        """Let go of a sequence's pages; its next forward recomputes them. Its canvas is untouched."""
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.cached, sequence.node, sequence.refreshed = 0, sequence.root, False

    def plan(self) -> list[Span]:
        """Rows of the next forward. Sequences without pages for theirs sit it out; the oldest never does."""
        spans = []
        for sequence in list(self.running.values()):
            span = self._paged(sequence) if self.block_causal else self._window(sequence)
            if span is not None:
                spans.append(span)
        return spans

    def _paged(self, sequence: Sequence) -> Span | None:
        """Rows of a block-causal sequence: finished blocks that are not cached yet, then its live block."""
        size, live = self.config.block_size, sequence.live
        if sequence.request.policy.cache == "none":
            return Span(sequence, 0, sequence.live_end, size)
        self._reuse(sequence)
        first = sequence.cached
        num_blocks = (live - first) // size
        if self.max_rows is not None:
            num_blocks = min(num_blocks, max(1, self.max_rows // size))
        if not self._give_pages(sequence, num_blocks):
            return None
        for _ in range(num_blocks):
            self._finish_block(sequence)
        written = sequence.cached
        if written < live or (num_blocks and not self.merged_commit):
            return Span(sequence, first, written, size, decides=False, keep=written, prefix=first)
        if first == live and self._needs_block_before(sequence):
            return Span(sequence, live - size, sequence.live_end, size, prefix=live - size)
        return Span(sequence, first, sequence.live_end, size, keep=live, prefix=first)

    def _needs_block_before(self, sequence: Sequence) -> bool:
        """Whether the last row of the block before predicts something, as it does for the first of shifted logits.

        Its page holds its keys and values, but not what the head reads: the block is run again, and not written.
        """
        undecided = sequence.first_masked or sequence.edits_block
        return self.config.logit_shift and undecided and sequence.live >= len(sequence.request.prompt_ids)

    def _window(self, sequence: Sequence) -> Span | None:
        """Rows of a bidirectional sequence: its whole window, or what its approximate cache leaves to be done."""
        policy, window = sequence.request.policy, sequence.window
        if policy.cache in ("exact", "none"):
            return Span(sequence, 0, window, window)
        held = bool(sequence.pages)
        if not held and not self._give_pages(sequence, -(-window // self.page_size)):
            return None
        every = policy.refresh_every
        if not sequence.refreshed or (every is not None and sequence.block_step % every == 0):
            sequence.refreshed = True
            return Span(sequence, 0, window, window, keep=window, refreshes=held)
        live, live_end = sequence.live, sequence.live_end
        if policy.cache == "prefix":
            return Span(sequence, live, window, window, prefix=live)
        return Span(sequence, live, live_end, window, prefix=live, suffix_start=live_end, suffix_end=window)

    def _reuse(self, sequence: Sequence) -> None:
        """Share published pages that hold the next blocks of this sequence."""
        size = self.config.block_size
        while sequence.cached < sequence.live:
            found = self.pool.find(sequence.node, self._block(sequence))
            if found is None:
                return
            page, sequence.node = found
            sequence.pages.append(page)
            sequence.cached += size

    def _finish_block(self, sequence: Sequence) -> None:
        """The next block's keys and values will be in its page after this forward, for others to share."""
        page = sequence.pages[sequence.cached // self.config.block_size]
        sequence.node = self.pool.publish(page, sequence.node, self._block(sequence))
        sequence.cached += self.config.block_size

    def _block(self, sequence: Sequence) -> tuple[int, ...]:
        return tuple(sequence.ids[sequence.cached : sequence.cached + self.config.block_size])

    def _give_pages(self, sequence: Sequence, num_pages: int) -> bool:
        """Pages for a sequence, taken from younger ones if need be; without enough it gives up its own.

        Approximate caches are not taken away: rebuilding one in the middle of a block would change what it computes.
        """
        taken: list[int] = []
        while len(taken) < num_pages:  # a request that could never have enough was refused at the door
            page = self.pool.take()
            if page is not None:
                taken.append(page)
            elif not self.block_causal or not self._preempt_younger(sequence):
                self.pool.release(taken)
                if self.block_causal:
                    self.preemptions += bool(sequence.pages)
                    self.drop_cache(sequence)
                return False
        sequence.pages += taken
        return True

    def _preempt_younger(self, sequence: Sequence) -> bool:
        """Take the pages of the youngest sequence that has some and came after this one."""
        for other in reversed(self.running.values()):
            if other is sequence:
                return False
            if other.pages:
                self.drop_cache(other)
                self.preemptions += 1
                return True
        return False
