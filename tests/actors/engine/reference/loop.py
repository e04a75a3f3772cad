"""The plain decoding loop that the engine must agree with: one request, no packing, no paging.

Read `Block.forward` for what one forward decides and `decode` for when blocks and requests end. A position is
absolute: prompt from 0, then the generated ones, then the suffix of an infill request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tests.actors.engine.reference.attention import Window, block_causal_logits
from tests.actors.engine.reference.policy import Candidate, candidate, opens
from tests.actors.engine.reference.text import certain_stop, final_text, tokens_before
from tokenizers import Tokenizer

from fewstep.actors.engine.request import Request
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.records import DecodePolicy

# A decision closer than this to falling the other way may do so where arithmetic rounds differently: float32
# log-probabilities of these models agree to some 1e-6 between batch shapes, and to 2.3e-5 in the worst of 1,000 requests.
ROUNDING = 3e-5


@dataclass
class PlainResult:
    """What a Trajectory should hold; canvas, step_map and logprob over the generated positions it covers.

    edits: (canvas position, step it had been written, token lost, its log-probability), in order of time.
    states: the canvas before each deciding forward; num_edit_only: forwards after the last mask of a block.
    """

    canvas: list[int]
    step_map: list[int]
    logprob: list[float]
    edits: list[tuple[int, int, int, float]]
    num_tokens: int
    forwards: int
    finish_reason: str
    text: str
    margin: float
    states: list[list[int]]
    num_blocks: int
    num_edit_only: int
    cache_drift: float

    @property
    def decisive(self) -> bool:
        """No decision was so close that rounding could turn it."""
        return self.margin > ROUNDING


@dataclass
class Canvas:
    """Every position of one request and what is known about its last write."""

    tokens: list[int]
    step_map: list[int]
    logprob: list[float]
    edits: list[tuple[int, int, int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, prompt: tuple[int, ...], num_masks: int, mask: int, suffix: tuple[int, ...]) -> Canvas:
        tokens = [*prompt, *[mask] * num_masks, *suffix]
        return cls(tokens, [-1] * len(tokens), [math.nan] * len(tokens))

    def write(self, position: int, token: int, logprob: float, step: int) -> None:
        self.tokens[position], self.logprob[position], self.step_map[position] = token, logprob, step


@dataclass
class Block:
    """The live block: the positions a forward may write, and how many forwards it has had."""

    canvas: Canvas
    generated: range
    policy: DecodePolicy
    mask: int
    ends: frozenset[int]
    eos: int
    num_opening: int = 0
    num_edit_only: int = 0
    over: bool = False

    @property
    def masked(self) -> list[int]:
        return [p for p in self.generated if self.canvas.tokens[p] == self.mask]

    @property
    def first_end(self) -> int | None:
        return next((p for p in self.generated if self.canvas.tokens[p] in self.ends), None)

    @property
    def editable(self) -> list[int]:
        """Written positions that are not behind an end of sequence."""
        if self.policy.edit_threshold is None:
            return []
        last = self.generated[-1] if self.first_end is None else self.first_end
        return [p for p in self.generated if self.canvas.tokens[p] != self.mask and p <= last]

    def forward(self, found: dict[int, Candidate], step: int) -> float:
        """Write what one deciding forward decides; `found` covers `masked` and `editable`. Returns the margin."""
        masked, editable, tokens = self.masked, self.editable, self.canvas.tokens
        limit = self.policy.max_steps_per_block
        last_chance = limit is not None and self.num_opening + 1 >= limit
        opened, margin = opens({p: found[p] for p in masked}, self.policy, last_chance)
        edited = []
        for p in editable:
            if found[p].token != tokens[p]:
                margin = min(margin, abs(found[p].confidence - self.policy.edit_threshold))
                if found[p].confidence > self.policy.edit_threshold:
                    edited.append(p)
        # A greedy candidate that is not written matters by its confidence only; a drawn one might have been
        # another token of any confidence.
        decisive = found if self.policy.temperature > 0 else {*opened, *editable}
        margin = min([margin, *(found[p].margin for p in decisive)])

        for p in edited:
            lost = (p, self.canvas.step_map[p], tokens[p], self.canvas.logprob[p])
            self.canvas.edits.append(lost)
        for p in (*opened, *edited):
            self.canvas.write(p, found[p].token, found[p].logprob, step)
        end = self.first_end
        for p in self.masked if end is not None else []:
            if p > end:
                self.canvas.write(p, self.eos, math.nan, step)
        self._count(opening=bool(masked), edited=bool(edited))
        return margin

    def _count(self, opening: bool, edited: bool) -> None:
        self.num_opening += opening
        self.num_edit_only += not opening
        if self.policy.edit_threshold is None or self.policy.max_edit_steps == 0:
            self.over = not self.masked
        elif not opening:
            self.over = not edited or self.num_edit_only >= self.policy.max_edit_steps


def block_ranges(model: Transformer, request: Request) -> Iterator[tuple[int, int, range]]:
    """(first, end, positions to generate) of every block from the first live one on."""
    config, start = model.config, len(request.prompt_ids)
    limit = start + request.max_tokens
    if config.attention_kind == "bidirectional":
        size = request.policy.block_size or config.block_size
        for first in range(start, limit, size):
            end = min(first + size, limit)
            yield first, end, range(first, end)
        return
    size = config.block_size
    for first in range(start // size * size, limit, size):
        end = first + size
        # Without a suffix a block is denoised to its end, whatever max_tokens cuts off it afterwards.
        yield first, end, range(max(start, first), min(end, limit) if request.suffix_ids else end)


class Eyes:
    """Logits of the live block under the model's attention and the policy's cache."""

    def __init__(self, request: Request) -> None:
        self.request, self.window = request, Window()

    @property
    def drift(self) -> float:
        """Mean over the refreshes of an approximate cache; 0 where nothing is kept, so nothing gets stale."""
        drifts = self.window.drifts if self.request.policy.cache in ("prefix", "dual") else []
        return sum(drifts) / len(drifts) if drifts else 0.0

    def logits(
        self, model: Transformer, tokens: list[int], first: int, end: int, num_forwards: int, stale: bool
    ) -> torch.Tensor:
        """[L, V], defined on the live block at least: what is said of a position, whichever row says it.

        Args:
            num_forwards: forwards the block has had; stale: the kept keys and values are of other weights.
        """
        rows = self._rows(model, tokens, first, end, num_forwards, stale)
        return rows.roll(1, 0) if model.config.logit_shift else rows

    def _rows(
        self, model: Transformer, tokens: list[int], first: int, end: int, num_forwards: int, stale: bool
    ) -> torch.Tensor:
        if model.config.attention_kind == "block_causal":
            # A block is whole: what nobody has written is a mask, behind a suffix as behind max_tokens. Later blocks
            # are never seen.
            unwritten = [model.config.mask_token_id] * (end - len(tokens[:end]))
            return block_causal_logits(model, tokens[:end] + unwritten)
        policy, length = self.request.policy, len(tokens)
        if stale:
            self.window.forget()
        whole = num_forwards == 0 or stale or policy.cache in ("exact", "none")
        if policy.refresh_every is not None:
            whole = whole or num_forwards % policy.refresh_every == 0
        if whole:
            return self.window.logits(model, tokens, 0, length)
        return self.window.logits(model, tokens, first, length if policy.cache == "prefix" else end)


def decode(
    model: Transformer,
    request: Request,
    *,
    tokenizer: Tokenizer | None = None,
    swap: tuple[int, Transformer] | None = None,
    stop_after: int | None = None,
) -> PlainResult:
    """One request from its definition.

    Args:
        tokenizer: needed for text and stop strings.
        swap: (step, model) from which deciding forward on another model decides.
        stop_after: abort after this many deciding forwards.
    """
    config, start = model.config, len(request.prompt_ids)
    limit = start + request.max_tokens
    ends = frozenset() if request.ignore_eos else frozenset((config.eos_token_id, *request.stop_ids))
    bounded = config.attention_kind == "bidirectional" or bool(request.suffix_ids)
    num_masks = request.max_tokens if bounded else -(-limit // config.block_size) * config.block_size - start
    canvas = Canvas.of(request.prompt_ids, num_masks, config.mask_token_id, request.suffix_ids)
    eyes, step, margin, edit_only, states, text, num_tokens = Eyes(request), 0, math.inf, 0, [], "", 0
    for number, (first, end, generated) in enumerate(block_ranges(model, request)):
        block = Block(canvas, generated, request.policy, config.mask_token_id, ends, config.eos_token_id)
        reason = None
        while not block.over and reason is None:
            if step == stop_after:
                reason = "abort"
                break
            stale = swap is not None and step == swap[0]
            current = swap[1] if swap is not None and step >= swap[0] else model
            num_forwards = block.num_opening + block.num_edit_only
            states.append(canvas.tokens[start : limit if bounded else end])
            logits = eyes.logits(current, canvas.tokens, first, end, num_forwards, stale)
            rows = block.masked + block.editable
            found = {p: candidate(logits[p], request.policy, p, step) for p in rows}
            margin = min(margin, block.forward(found, step))
            step += 1
            reason, text, num_tokens = progress(block, request, start, limit, tokenizer)
        edit_only += block.num_edit_only
        if reason is not None:
            span = slice(start, limit if bounded else end)
            return PlainResult(
                canvas=canvas.tokens[span],
                step_map=canvas.step_map[span],
                logprob=canvas.logprob[span],
                edits=[(p - start, *rest) for p, *rest in canvas.edits],
                num_tokens=num_tokens,
                forwards=step,
                finish_reason=reason,
                text=text,
                margin=margin,
                states=states,
                num_blocks=number + 1,
                num_edit_only=edit_only,
                cache_drift=eyes.drift,
            )
    raise AssertionError("a request that fits the context ends inside it")


def progress(
    block: Block, request: Request, start: int, limit: int, tokenizer: Tokenizer | None
) -> tuple[str | None, str, int]:
    """(finish reason or None, text so far, tokens that count so far) after a forward of the live block."""
    tokens, end = block.canvas.tokens, block.first_end
    stopped = end is not None and end < limit
    boundary = end if stopped else limit
    written = block.masked[0] if block.masked else block.generated[-1] + 1
    # While a block may still be edited nothing of it is final.
    editing = block.policy.edit_threshold is not None and not block.over
    final = min(block.generated[0] if editing else written, boundary)
    finished = not editing and written >= boundary
    ids = tokens[start:final]
    num_tokens = len(ids) + (finished and stopped)
    if tokenizer is None:
        assert not request.stop, "stop strings need a tokenizer"
        return (("stop" if stopped else "length") if finished else None), "", num_tokens
    text = final_text(tokenizer, ids)
    cut = certain_stop(text, request.stop, finished)
    if cut is not None:
        return "stop", text[:cut], tokens_before(tokenizer, ids, cut)
    return (("stop" if stopped else "length") if finished else None), text, num_tokens
