"""What a forward's report means for a sequence: text that became final, the next block, the end."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.actors.engine.canvas import BlockReport
from fewstep.actors.engine.scheduler import Sequence


@dataclass(frozen=True)
class Outcome:
    """What one forward did to one sequence, absolute positions.

    Attributes:
        failed: its logits were not usable.
        finished: nothing that counts is left to decide; eos: because an end of sequence came first.
        text_end: every generated position before it is final and is not behind an end of sequence.
    """

    failed: bool
    finished: bool
    eos: bool
    text_end: int


def advance(sequence: Sequence, report: BlockReport, block_size: int) -> Outcome:
    """Count the forward and move a sequence past its block once nothing in it will change any more.

    Without editing a token is final when it is written, so a sequence may finish inside a block. With editing it is
    final when its block is: after the first forward that found no mask and changed nothing, or after
    `max_edit_steps` forwards that found no mask.
    """
    sequence.step += 1
    sequence.block_step += 1
    size, left = sequence.live_end - sequence.live, sequence.end - sequence.live
    counted = min(report.first_end, left)
    # A forward's blocks are padded to the widest of them, where there is nothing to write.
    first_mask = min(report.first_mask, size)
    full = first_mask == size
    sequence.first_masked = first_mask == 0
    if sequence.edits_block:
        block_done = full and _settled(sequence, report)
        written = size if block_done else 0
        finished = block_done and size >= counted
    else:
        block_done, written = full, first_mask
        finished = written >= counted
    outcome = Outcome(report.failed, finished, report.first_end < left, sequence.live + min(written, counted))
    if block_done and not finished:
        sequence.ids += report.tokens[:size]
        sequence.live = sequence.live_end
        sequence.live_end = min(sequence.live + block_size, sequence.bound)
        sequence.block_step = sequence.edit_step = 0
        sequence.full = sequence.refreshed = False
        sequence.first_masked = True
    return outcome


def _settled(sequence: Sequence, report: BlockReport) -> bool:
    """Whether a block without masks is done with editing."""
    limit = sequence.request.policy.max_edit_steps
    if not sequence.full:
        sequence.full = True
        return limit == 0
    sequence.edit_step += 1
    return report.num_edits == 0 or sequence.edit_step >= limit
