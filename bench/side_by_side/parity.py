"""Whether two engines decoded the same: the same positions opened in the same forwards with the same tokens.

Floating point lets two right engines part where two confidences or two logits all but tie, and everything behind that
point then differs too. So the first difference is looked up in the peer's own numbers: if what was chosen the
other way was that close, it is a near-tie; if not, one of the two is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal[True, False, "approximate"]
# [position, opened, token, log-probability, margin] of the masked positions of a forward's block.
Row = Sequence[float]
Opening = Sequence[Row]

# Nats, or logits. fp32 noise of the compared networks is below 1e-4 (`max_logprob_difference` states it).
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Difference:
    """The first forward of a sequence that opened something else.

    Attributes:
        opening: its number among the forwards that opened something; in_block: the same within its block.
        position: first position that differs, counted from the prompt's end.
        gap: how far the peer's numbers were from the other choice.
    """

    sequence: int
    opening: int
    in_block: int
    position: int
    gap: float

    @property
    def near_tie(self) -> bool:
        return self.gap <= NEAR_TIE


@dataclass(frozen=True)
class Parity:
    """The outcome over all sequences.

    Attributes:
        verdict: True = the same, near-ties aside; `approximate` = both use a stale cache, agree where it does not matter
            (the first forward of a block sees everything fresh), and part where it does; False = one is wrong.
        fraction_equal: of the tokens.
        differences: first one of each sequence that has any.
        max_logprob_difference: over what both opened before they parted.
    """

    verdict: Verdict
    fraction_equal: float
    differences: tuple[Difference, ...]
    max_logprob_difference: float

    def as_dict(self) -> dict[str, Any]:
        """For the report; of the differences the one with the widest gap."""
        worst = max(self.differences, key=lambda difference: difference.gap, default=None)
        return {
            "fraction_equal": self.fraction_equal,
            "max_logprob_difference": self.max_logprob_difference,
            "num_near_ties": sum(difference.near_tie for difference in self.differences),
            "num_differences": len(self.differences),
            "first_difference": None
            if worst is None
            else {"opening": worst.opening, "position": worst.position, "gap": worst.gap},
        }


def compare(
    ours: dict[str, Any], peer: dict[str, Any], stale_cache: bool, threshold: float | None, block_size: int
) -> Parity:
    """Parity of two traced replies to the same prompts.

    Args:
        stale_cache: both decode with a prefix or dual cache.
        threshold: of the policy; None = a static schedule.
    """
    pairs = [
        (mine, theirs)
        for answer, other in zip(ours["tokens"], peer["tokens"], strict=True)
        for mine, theirs in zip(answer, other, strict=True)
    ]
    differences, noise = [], 0.0
    for number, (mine, theirs) in enumerate(zip(ours["openings"], peer["openings"], strict=True)):
        difference, deviation = first_difference(number, mine, theirs, threshold, block_size)
        noise = max(noise, deviation)
        if difference is not None:
            differences.append(difference)
    equal = sum(mine == theirs for mine, theirs in pairs)
    wrong = [difference for difference in differences if not difference.near_tie]
    verdict: Verdict = not wrong
    if not differences and equal < len(pairs):
        verdict = False
    elif wrong and stale_cache and all(difference.in_block > 0 for difference in wrong):
        verdict = "approximate"
    return Parity(verdict, equal / len(pairs), tuple(differences), noise)


def first_difference(
    number: int, ours: Sequence[Opening], peer: Sequence[Opening], threshold: float | None, block_size: int
) -> tuple[Difference | None, float]:
    """Of one sequence, and the largest difference of log-probabilities before it."""
    noise, block, in_block = 0.0, -1, 0
    for index in range(max(len(ours), len(peer))):
        if index >= len(ours) or index >= len(peer):
            return Difference(number, index, in_block, -1, math.inf), noise
        mine, theirs = _opened(ours[index]), _opened(peer[index])
        here = int(min(theirs)) // block_size
        in_block = in_block + 1 if here == block else 0
        block = here
        if {at: row[2] for at, row in mine.items()} != {at: row[2] for at, row in theirs.items()}:
            position, gap = _gap(mine, peer[index], threshold)
            return Difference(number, index, in_block, position, gap), noise
        noise = max(noise, *(abs(mine[at][3] - theirs[at][3]) for at in mine))
    return None, noise


def _opened(opening: Opening) -> dict[float, Row]:
    return {row[0]: row for row in opening if row[1]}


def _gap(mine: dict[float, Row], peer: Opening, threshold: float | None) -> tuple[int, float]:
    """First differing position, and how far the peer was from opening what we opened."""
    seen = {row[0]: row for row in peer}
    theirs = _opened(peer)
    other_token = [at for at in mine.keys() & theirs.keys() if mine[at][2] != theirs[at][2]]
    ours_only, peer_only = mine.keys() - theirs.keys(), theirs.keys() - mine.keys()
    gaps = [seen[at][4] for at in other_token]
    if any(at not in seen for at in ours_only):
        return int(min(ours_only)), math.inf  # the peer had it open already, or was in another block
    # A position opened by both sides' rules has the same token; of one that only we opened, the peer's may differ.
    gaps += [seen[at][4] for at in ours_only if mine[at][2] != seen[at][2]]
    if ours_only or peer_only:
        gaps.append(
            _choice_gap([seen[at][3] for at in ours_only], [seen[at][3] for at in peer_only], threshold)
        )
    return int(min([*other_token, *ours_only, *peer_only])), max(gaps)


def _choice_gap(ours: list[float], peer: list[float], threshold: float | None) -> float:
    """How far the peer's log-probabilities were from opening `ours` and not `peer`.

    By rank, if each side opened something the other did not (a static schedule opens equally many, and a threshold
    that nobody reaches the best one); by distance from the threshold, if there is one.
    """
    by_rank = max(peer) - min(ours) if ours and peer else math.inf
    if threshold is None:
        return by_rank
    return min(by_rank, max(abs(value - math.log(threshold)) for value in ours + peer))
