"""The film strip of an evaluation: one task's canvas, forward by forward, one token per step and at the cheapest good policy."""

from __future__ import annotations

from pathlib import Path

from fewstep.pipelines.evaluation import Subject
from fewstep.pipelines.evaluation_settings import EvaluateConfig
from fewstep.pipelines.evaluation_summary import FrontierSummary
from fewstep.pipelines.film_strip import Strip, draw_film_strips, token_texts
from fewstep.platform.records import DecodePolicy, Rollout
from fewstep.platform.trajectories import read_rollouts


def draw_film(config: EvaluateConfig, subject: Subject, benchmark: str, frontier: FrontierSummary) -> None:
    """film.png of the first part's first task that both policies solve, or of its first task where there is none."""
    chosen = dict.fromkeys((frontier.policies[0].point.policy, frontier.cheapest.point.policy))
    answers = list(zip(*(_first_part(config, subject, benchmark, policy) for policy in chosen), strict=True))
    row = next((row for row in answers if all(rollout.verdict.passed for rollout in row)), answers[0])
    strips = [
        Strip(
            f"{rollout.task_id}, {policy.label()}: {rollout.trajectory.num_tokens} tokens in "
            f"{rollout.trajectory.forwards} forwards, {rollout.verdict.outcome}",
            rollout.trajectory,
            token_texts(subject.tokenizer, rollout.trajectory),
        )
        for policy, rollout in zip(chosen, row, strict=True)
    ]
    draw_film_strips(config.out / "film.png", strips, subject.model.block_size)


def _first_part(
    config: EvaluateConfig, subject: Subject, benchmark: str, policy: DecodePolicy
) -> list[Rollout]:
    folder: Path = config.out / "trajectories" / subject.slot / benchmark / policy.label()
    return read_rollouts(min(folder.glob("*.parquet")))
