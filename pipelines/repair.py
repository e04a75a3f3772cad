"""Repair: an answer with a few wrong tokens is handed to the model, which writes over what it doubts.

The edit process of the curriculum (Seed Diffusion, 2508.02193, section 3.1) as a task: the canvas starts from a corrupted
right answer instead of masks, and a written token is replaced by another one of more than a threshold's confidence
(LLaDA2.1, 2602.08676), block by block, until a forward changes nothing. Run without a cache, straight on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fewstep.actors.engine.text import decode
from fewstep.kernels.attention import visibility
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer, masked_attention
from fewstep.pipelines.frontier import refuse_broken
from fewstep.pipelines.significance import Interval, PairedTest, holm, mean_interval, paired_test
from fewstep.platform.records import Task, Verdict
from fewstep.platform.rng import generator

MAX_ROUNDS = 16
"""Forwards that may change a block."""
_BATCH = 64
_PAD = -1

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Draft:
    """A corrupted right answer on its canvas.

    Attributes:
        tokens: int64 [L], prompt and answer, the last block filled up with ends of sequence.
        right: int64 [L], what stood there.
        num_prompt: positions that are not to be changed.
    """

    task: Task
    tokens: Tokens
    right: Tokens
    num_prompt: int

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """bool [L]: what was replaced."""
        return np.not_equal(self.tokens, self.right)


@dataclass(frozen=True)
class RepairSummary:
    """One threshold, or the drafts as they were (threshold None).

    Attributes:
        passed: share of the tasks whose program passes.
        forwards: a draft.
        restored: share of the replaced tokens that are right again; damaged: share of the others that no longer are.
        per_task: passed, in the order of the tasks.
    """

    threshold: float | None
    passed: Interval
    forwards: Interval
    restored: float
    damaged: float
    per_task: tuple[bool, ...]

    @property
    def name(self) -> str:
        return "unrepaired" if self.threshold is None else f"edit_{self.threshold:g}"

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, **{key: value for key, value in asdict(self).items() if key != "per_task"}}


def corrupted(
    tasks: Sequence[Task], tokenizer: Tokenizer, config: ModelConfig, share: float, seed: int
) -> list[Draft]:
    """Every task's canonical solution with a share of its tokens, at least one, replaced by tokens of other answers."""
    encoded = []
    for task in tasks:
        prompt = tokenizer.encode(task.prompt).ids
        answer = tokenizer.encode(task.canonical_solution, add_special_tokens=False).ids
        encoded.append((prompt, answer))
    vocabulary = np.array(sorted({token for _, answer in encoded for token in answer}), np.int64)
    drafts = []
    for task, (prompt, answer) in zip(tasks, encoded, strict=True):
        right = np.array([*prompt, *answer], np.int64)
        right = np.concatenate(
            (right, np.full(-len(right) % config.block_size or config.block_size, config.eos_token_id))
        )
        draws = generator("repair", seed, task.task_id)
        count = max(1, round(share * len(answer)))
        tokens = right.copy()
        for at in len(prompt) + draws.choice(len(answer), count, replace=False):
            others = vocabulary[vocabulary != right[at]]
            tokens[at] = others[draws.integers(len(others))]
        drafts.append(Draft(task, tokens, right, len(prompt)))
    return drafts


@torch.inference_mode()
def repair(model: Transformer, drafts: Sequence[Draft], threshold: float) -> tuple[list[Tokens], list[int]]:
    """The drafts after editing, int64 [L] each, and the forwards each took.

    Blocks from left to right, since later ones look back at earlier ones; a block is left when a forward changes
    nothing in it, or after MAX_ROUNDS.
    """
    repaired: list[Tokens] = []
    forwards: list[int] = []
    for start in range(0, len(drafts), _BATCH):
        batch = drafts[start : start + _BATCH]
        tokens, counts = _repair_batch(model, batch, threshold)
        repaired += [tokens[row, : len(draft.tokens)].numpy() for row, draft in enumerate(batch)]
        forwards += counts.tolist()
    return repaired, forwards


def _repair_batch(
    model: Transformer, drafts: Sequence[Draft], threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size, longest = model.config.block_size, max(len(draft.tokens) for draft in drafts)
    tokens = torch.full((len(drafts), longest), model.config.eos_token_id)
    copies = torch.full_like(tokens, _PAD)
    for row, draft in enumerate(drafts):
        tokens[row, : len(draft.tokens)] = torch.from_numpy(draft.tokens)
        copies[row, : len(draft.tokens)] = 0
    positions = torch.arange(longest).expand_as(tokens)
    answer = (copies == 0) & (positions >= torch.tensor([draft.num_prompt for draft in drafts])[:, None])
    block = torch.tensor([draft.num_prompt // size for draft in drafts])
    last = torch.tensor([len(draft.tokens) // size for draft in drafts])
    rounds, forwards = torch.zeros_like(block), torch.zeros_like(block)
    while (running := (block < last).nonzero().flatten()).numel():
        attention = masked_attention(visibility(positions[running], copies[running], size))
        logits = model.logits(model(tokens[running], positions[running], attention))
        confidence, candidate = logits.softmax(-1).max(-1)
        live = answer[running] & (positions[running] // size == block[running, None])
        change = live & (candidate != tokens[running]) & (confidence > threshold)
        tokens[running] = torch.where(change, candidate, tokens[running])
        forwards[running] += 1
        rounds[running] += 1
        done = ~change.any(-1) | (rounds[running] >= MAX_ROUNDS)
        block[running[done]] += 1
        rounds[running[done]] = 0
    return tokens, forwards


def measure_repair(
    model: Transformer,
    tokenizer: Tokenizer,
    drafts: Sequence[Draft],
    thresholds: Sequence[float],
    verify: Callable[[Sequence[tuple[Task, str]]], list[Verdict]],
) -> list[RepairSummary]:
    """The drafts as they are, then repaired at each threshold. Prints a line each.

    Raises:
        FewstepError: the verifier itself failed too often (`refuse_broken`).
    """
    summaries = []
    for threshold in (None, *thresholds):
        if threshold is None:
            tokens, forwards = [draft.tokens for draft in drafts], [0] * len(drafts)
        else:
            tokens, forwards = repair(model, drafts, threshold)
        texts = [
            decode(tokenizer, _answer(ids, draft.num_prompt, model.config.eos_token_id))
            for ids, draft in zip(tokens, drafts, strict=True)
        ]
        verdicts = verify([(draft.task, text) for draft, text in zip(drafts, texts, strict=True)])
        refuse_broken(verdicts, "repair")
        summaries.append(_summary(threshold, drafts, tokens, forwards, verdicts))
        one = summaries[-1]
        print(
            f"  {one.name:<16} {one.passed.text()} passed  {one.forwards.value:.2f} forwards  {one.restored:.3f} restored",
            flush=True,
        )
    return summaries


def _summary(
    threshold: float | None,
    drafts: Sequence[Draft],
    tokens: Sequence[Tokens],
    forwards: Sequence[int],
    verdicts: Sequence[Verdict],
) -> RepairSummary:
    passed = tuple(verdict.passed for verdict in verdicts)
    now_wrong = np.concatenate([ids != draft.right for ids, draft in zip(tokens, drafts, strict=True)])
    was_wrong = np.concatenate([draft.wrong for draft in drafts])
    answer = np.concatenate([np.arange(len(draft.tokens)) >= draft.num_prompt for draft in drafts])
    name = str(threshold)
    return RepairSummary(
        threshold=threshold,
        passed=mean_interval([float(value) for value in passed], "repair", name),
        forwards=mean_interval([float(count) for count in forwards], "repair", name, "forwards"),
        restored=float(1.0 - now_wrong[was_wrong].mean()),
        damaged=float(now_wrong[answer & ~was_wrong].mean()),
        per_task=passed,
    )


def _answer(tokens: Tokens, num_prompt: int, end: int) -> list[int]:
    ids: list[int] = tokens[num_prompt:].tolist()
    return ids[: ids.index(end)] if end in ids else ids


def compare_repairs(first: Sequence[RepairSummary], second: Sequence[RepairSummary]) -> dict[str, PairedTest]:
    """Second against first at each threshold, on the same drafts; Holm's correction over all of them."""
    pairs = [(one, other) for one, other in zip(first, second, strict=True) if one.threshold is not None]
    tests = [
        paired_test([float(p) for p in one.per_task], [float(p) for p in other.per_task], "repair", one.name)
        for one, other in pairs
    ]
    adjusted = holm([test.p_value for test in tests])
    return {
        one.name: replace(test, adjusted=p_value)
        for (one, _), test, p_value in zip(pairs, tests, adjusted, strict=True)
    }
