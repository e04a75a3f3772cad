"""The exact distribution of what sampling writes, by enumerating every draw of a one-block request."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict

from tests.actors.engine.reference.attention import block_causal_logits
from tests.actors.engine.reference.loop import Block, Canvas, block_ranges, progress
from tests.actors.engine.reference.policy import Candidate, sampling_weights

from fewstep.actors.engine.request import Request
from fewstep.kernels.model.transformer import Transformer

Outcomes = dict[tuple[int, ...], float]


def outcome_probabilities(model: Transformer, request: Request) -> Outcomes:
    """Probability of every completion of a block-causal request whose masks lie in one block."""
    ((_, end, generated),) = block_ranges(model, request)
    config = model.config
    canvas = Canvas.of(request.prompt_ids, end - len(request.prompt_ids), config.mask_token_id, ())
    ends = frozenset((config.eos_token_id, *request.stop_ids))
    known: dict[tuple[object, ...], Outcomes] = {}

    def after(block: Block) -> Outcomes:
        key = (tuple(block.canvas.tokens), block.num_opening, block.num_edit_only)
        if key not in known:
            known[key] = expand(block)
        return known[key]

    def expand(block: Block) -> Outcomes:
        start = len(request.prompt_ids)
        reason, _, num_tokens = progress(block, request, start, start + request.max_tokens, None)
        if reason is not None:
            return {tuple(block.canvas.tokens[start : start + num_tokens]): 1.0}
        total: Outcomes = defaultdict(float)
        for found, probability in draws(model, request, block):
            following = fork(block)
            following.forward(found, step=0)
            for completion, share in after(following).items():
                total[completion] += probability * share
        return total

    start_block = Block(canvas, generated, request.policy, config.mask_token_id, ends, config.eos_token_id)
    return after(start_block)


def draws(model: Transformer, request: Request, block: Block) -> list[tuple[dict[int, Candidate], float]]:
    """Every joint draw of a forward's candidates with its probability; positions draw independently."""
    logits = block_causal_logits(model, block.canvas.tokens)
    options = []
    rows = block.masked + block.editable
    for p in rows:
        logprobs = logits[p].double().log_softmax(-1).tolist()
        entropy = -sum(math.exp(value) * value for value in logprobs if value > -math.inf)
        weights, _ = sampling_weights(logits[p], request.policy)
        options.append(
            [
                (Candidate(token, logprobs[token], entropy, math.inf), weight / sum(weights))
                for token, weight in enumerate(weights)
                if weight > 0
            ]
        )
    return [
        (dict(zip(rows, (c for c, _ in joint), strict=True)), math.prod(share for _, share in joint))
        for joint in itertools.product(*options)
    ]


def fork(block: Block) -> Block:
    """A copy that can take another course."""
    canvas = Canvas(list(block.canvas.tokens), list(block.canvas.step_map), list(block.canvas.logprob))
    return dataclasses.replace(block, canvas=canvas)


def chi_square(counts: dict[tuple[int, ...], int], outcomes: Outcomes) -> tuple[float, float]:
    """(statistic, critical value at p = 1e-4) of observed counts; outcomes expected below 5 times are pooled.

    The critical value is Wilson and Hilferty's approximation: chi-square over its degrees of freedom, to the
    power 1/3, is nearly normal.
    """
    number = sum(counts.values())
    statistic, cells, rare_expected, rare_seen = 0.0, 0, 0.0, 0
    for completion in outcomes.keys() | counts.keys():
        expected = number * outcomes.get(completion, 0.0)
        if expected < 5.0:
            rare_expected, rare_seen = rare_expected + expected, rare_seen + counts.get(completion, 0)
            continue
        statistic, cells = statistic + (counts.get(completion, 0) - expected) ** 2 / expected, cells + 1
    if rare_expected or rare_seen:
        statistic += (rare_seen - rare_expected) ** 2 / max(rare_expected, 1e-9)
        cells += 1
    freedom = cells - 1
    normal = 3.719
    critical = freedom * (1 - 2 / (9 * freedom) + normal * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic, critical
