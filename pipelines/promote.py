"""`fewstep promote`: the candidate's frontier against the champion's, and the alias moves or does not."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fewstep.pipelines.promotion import (
    CHAMPION,
    Judgement,
    Mark,
    Standing,
    Trade,
    judge,
    standing_of,
)
from fewstep.pipelines.tracking_settings import Accepted, PromoteConfig
from fewstep.platform.errors import ConfigError
from fewstep.platform.mlflow_leftovers import deliver_leftovers
from fewstep.platform.mlflow_registry import alias_address, model_facts, move_alias
from fewstep.platform.mlflow_store import project_uri

_TRADES: dict[Accepted, tuple[Trade, ...]] = {
    "nothing": (), "quality": ("quality",), "speed": ("speed",), "both": ("quality", "speed")
}  # fmt: skip


@dataclass(frozen=True)
class Promotion:
    """What a promotion came to.

    Attributes:
        candidate: `models:/NAME/VERSION`.
        champion: the version it was held against; None = the model had no champion.
        judgement: what the rule says.
        promoted: whether the alias moved.
    """

    candidate: Standing
    champion: Standing | None
    judgement: Judgement
    promoted: bool


def run(config: PromoteConfig) -> None:
    """Promotes, prints both frontiers and what was decided.

    Raises:
        ConfigError: the candidate gives up something that was not accepted, or is nowhere better.
    """
    uri = project_uri(config.tracking_uri)
    deliver_leftovers(uri)
    by_number = config.candidate.isdigit()
    address = (
        f"models:/{config.name}/{config.candidate}"
        if by_number
        else f"models:/{config.name}@{config.candidate}"
    )
    result = promote(address, uri, config.accept)
    print(standings_text(result), flush=True)
    if not result.promoted:
        refuse(result)
    print(f"\nmodels:/{config.name}@{CHAMPION} is now {result.candidate.address}", flush=True)


def promote(address: str, tracking_uri: str, accept: Accepted = "nothing") -> Promotion:
    """Moves `champion` to a version if the rule of promotion.py lets it.

    Args:
        address: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        accept: the trades that are accepted.
    Raises:
        ConfigError: no such version, or one that cannot be compared.
        ResourceError: the store does not answer.
    """
    candidate = standing_of(*model_facts(address, tracking_uri))
    name = candidate.address.removeprefix("models:/").partition("/")[0]
    current = alias_address(name, CHAMPION, tracking_uri)
    champion = standing_of(*model_facts(current, tracking_uri)) if current else None
    if current == candidate.address:
        return Promotion(candidate, champion, Judgement((), True, ()), True)
    judgement = judge(candidate, champion)
    promoted = judgement.gains and set(judgement.gives_up) <= set(_TRADES[accept])
    if promoted:
        why = (
            "nowhere worse"
            if not judgement.gives_up
            else f"accepted: less {' and '.join(judgement.gives_up)}"
        )
        over = champion.address if champion is not None else "the model it was refined from"
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        move_alias(
            candidate.address, CHAMPION, tracking_uri, {"fewstep.promoted": f"{stamp} over {over}: {why}"}
        )
    return Promotion(candidate, champion, judgement, promoted)


def refuse(result: Promotion) -> None:
    """Raises the ConfigError of a candidate that was not promoted."""
    judgement, rival = result.judgement, result.champion
    against = rival.address if rival is not None else "the model it was refined from"
    if not judgement.gains:
        raise ConfigError(
            "candidate", f"{result.candidate.address}, which is nowhere better than {against}",
            "a candidate that is better somewhere", "keep the champion",
        )  # fmt: skip
    needed = "both" if len(judgement.gives_up) == 2 else judgement.gives_up[0]
    raise ConfigError(
        "candidate", f"{result.candidate.address}, which against {against} gives up {'; '.join(judgement.reasons)}",
        "a frontier that dominates", f"accept the trade by name with --accept {needed}, or keep the champion",
    )  # fmt: skip


def standings_text(result: Promotion) -> str:
    """Both frontiers, one below the other, without their dominated points."""
    champion = result.champion
    blocks = [("candidate", result.candidate.address, result.candidate.marks)]
    if champion is not None:
        blocks.append(("champion", champion.address, champion.marks))
    else:
        blocks.append(("unrefined", f"bar {result.candidate.bar:.3f}", result.candidate.unrefined))
    lines = [f"measured on {result.candidate.data}, {result.candidate.num_tasks} tasks"]
    for name, address, marks in blocks:
        lines.append(f"{name:<10} {address}")
        lines += [_line(mark) for mark in marks]
    return "\n".join(lines)


def _line(mark: Mark) -> str:
    return (
        f"    {mark.label:<16} pass@1 {mark.pass_at_1:.3f}  {mark.forwards_per_answer:7.2f} forwards/answer"
    )
