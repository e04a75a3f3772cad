"""The figures of a refinement: frontier, curves, forwards per answer, the time of a step, films of single answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from fewstep.pipelines.figures import Panel, draw_curves, draw_frontier, draw_steps_histogram
from fewstep.pipelines.film_strip import Strip, draw_film_strips, token_texts
from fewstep.pipelines.frontier import Speedup
from fewstep.platform.records import FrontierPoint, Rollout

REFINE_PANELS = (
    Panel("reward/pass_rate", "share of rollouts that pass"),
    Panel("rollout/forwards_per_answer", "forwards per rollout"),
    Panel("rollout/tokens_per_forward", "tokens per forward (TPF)"),
    Panel("rollout/threshold", "the sampler's confidence threshold"),
)
LENGTH_PANELS = (
    Panel("reward/mean", "reward"),
    Panel("rollout/tokens_per_answer", "tokens per rollout"),
)
TIME_PANELS = (
    Panel("sync/seconds", "weight push to every replica (s)"),
    Panel("perf/generate_seconds", "generation (s)"),
    Panel("perf/verify_seconds", "verification (s)"),
    Panel("perf/train_seconds", "training (s)"),
)


def draw_run(
    folder: Path,
    name: str,
    history: Sequence[Mapping[str, float]],
    before: Sequence[FrontierPoint],
    after: Sequence[FrontierPoint],
    speedup: Speedup,
    answers: Mapping[str, Sequence[Rollout]],
) -> list[str]:
    """Draws everything but the films into a folder; returns the figures' names.

    Args:
        name: of the curves.
        history: one row of metrics a step.
        answers: the held-out answers `before` and `after`, at the policies that `speedup` compares.
    """
    draw_frontier(folder / "frontier.png", before, after, speedup=speedup)
    draw_curves(folder / "curves.png", {name: history}, (*REFINE_PANELS, *LENGTH_PANELS))
    draw_curves(folder / "sync.png", {name: history}, TIME_PANELS)
    sides = ([rollout.trajectory for rollout in answers[when]] for when in ("before", "after"))
    draw_steps_histogram(folder / "steps.png", *sides)
    return ["frontier", "curves", "steps", "sync"]


def draw_films(
    folder: Path,
    answers: Mapping[str, Sequence[Rollout]],
    policies: Mapping[str, str],
    tokenizer: Tokenizer,
    block_size: int,
) -> list[str]:
    """The canvas of up to three answers, forward by forward, before and after; returns the figures' names.

    Args:
        answers: `before` and `after`, the same tasks in the same order.
        policies: what each side decoded with.
    """
    names = []
    for number, index in enumerate(telling_tasks(answers["before"], answers["after"]), start=1):
        strips = []
        for when in ("before", "after"):
            own = answers[when][index]
            title = (
                f"{when} refinement, {policies[when]}: {own.trajectory.num_tokens} tokens in "
                f"{own.trajectory.forwards} forwards, {own.verdict.outcome}"
            )
            strips.append(Strip(title, own.trajectory, token_texts(tokenizer, own.trajectory)))
        name = "film" if number == 1 else f"film_{number}"
        draw_film_strips(folder / f"{name}.png", strips, block_size)
        names.append(name)
    return names


def telling_tasks(before: Sequence[Rollout], after: Sequence[Rollout]) -> list[int]:
    """Indices of the tasks worth a film: right on both sides with the median saving, made right, made wrong; those
    there are, at least one."""
    pairs = list(zip(before, after, strict=True))
    both = [i for i, (one, two) in enumerate(pairs) if one.verdict.passed and two.verdict.passed]
    both.sort(key=lambda i: (pairs[i][0].trajectory.forwards / pairs[i][1].trajectory.forwards, i))
    chosen = [both[len(both) // 2]] if both else []
    for was, became in ((False, True), (True, False)):
        changed = (
            i
            for i, (one, two) in enumerate(pairs)
            if (one.verdict.passed, two.verdict.passed) == (was, became)
        )
        chosen += [index for index in (next(changed, None),) if index is not None]
    return chosen or [0]
