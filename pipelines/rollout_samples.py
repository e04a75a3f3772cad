"""What is kept of single rollouts beside their Parquet file: traces of a few, and how the many are spread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fewstep.pipelines.objectives.credit import Credit
from fewstep.platform.records import Outcome, Rollout
from fewstep.platform.rng import generator
from fewstep.platform.rollout_trace import CREDIT, EXTRACT, GENERATE, VERIFY, RolloutTrace, Span, Window
from fewstep.platform.tracking import Tracker
from fewstep.platform.trajectories import read_rollouts

Windows = Mapping[str, Window]
_TABLE_ROWS = 500


def log_traces(
    tracker: Tracker, prompts: Mapping[str, str], credits: Sequence[Credit], windows: Windows, *, seed: int, step: int,
    per_step: float,
) -> None:  # fmt: skip
    """Logs the traces of `per_step` of a step's rollouts on average, evenly over the steps, drawn by (seed, step).

    Args:
        prompts: task id to prompt.
        credits: of all the step's rollouts.
        windows: when each stage of the whole batch began and ended.
    """
    chosen = generator("traces", seed, step).permutation(len(credits))[: num_traces(step, per_step)]
    for index in chosen.tolist():
        rollout, reward = credits[index].rollout, credits[index].reward
        tags = {
            "step": str(step), "prompt": str(rollout.group_id), "sample": str(rollout.sample),
            "outcome": rollout.verdict.outcome,
        }  # fmt: skip
        tracker.log_trace(rollout_trace(rollout, prompts[rollout.task_id], reward, windows, tags))


def num_traces(step: int, per_step: float) -> int:
    """How many rollouts of a step are traced, at so many a step on average; the first step has one at any rate."""
    return math.ceil((step + 1) * per_step) - math.ceil(step * per_step)


def rollout_trace(
    rollout: Rollout,
    prompt: str,
    reward: float,
    windows: Windows,
    tags: Mapping[str, str],
) -> RolloutTrace:
    """One rollout, stage by stage. A stage's times are its batch's; what is the rollout's own is an attribute."""
    trajectory, verdict = rollout.trajectory, rollout.verdict

    def stage(name: str, window: str, **details: Mapping[str, object]) -> Span:
        own = windows[window]
        return Span(name, own.start_ns, own.end_ns, **details)  # type: ignore[arg-type]

    return RolloutTrace(
        request=prompt,
        response=rollout.text,
        spans=(
            stage(
                "rollout", GENERATE, inputs={"prompt": prompt, "policy": trajectory.policy.label()},
                outputs={"tokens": trajectory.completion_ids.tolist()},
                attributes={
                    "forwards": trajectory.forwards, "num_tokens": trajectory.num_tokens,
                    "tokens_per_forward": round(trajectory.tokens_per_forward, 3),
                    "finish_reason": trajectory.finish_reason, "weight_version": trajectory.weight_version_last,
                },
            ),
            stage("extraction", EXTRACT, outputs={"completion": rollout.text}),
            Span(
                "sandbox", windows[VERIFY].start_ns, windows[VERIFY].end_ns, inputs={"program": prompt + rollout.text},
                outputs={"outcome": verdict.outcome, "score": verdict.score, "tests": list(verdict.tests)},
                attributes={"own_seconds": verdict.seconds, "isolation": verdict.isolation, "detail": verdict.detail},
                failed=not verdict.passed,
            ),
            stage("reward", CREDIT, outputs={"reward": reward, "advantage": rollout.advantage}),
        ),
        tags=tags,
        feedback={"passed": verdict.passed, "outcome": verdict.outcome, "forwards": float(trajectory.forwards)},
    )  # fmt: skip


def sample_table(folder: Path, seed: int) -> list[dict[str, Any]]:
    """One rollout of each step's file, drawn by (seed, step), for a table; of a long run the newest steps.

    Args:
        folder: of `step_NNNNN.parquet` files.
    """
    rows = []
    for path in sorted(folder.glob("step_*.parquet"))[-_TABLE_ROWS:]:
        rollouts, step = read_rollouts(path), int(path.stem.removeprefix("step_"))
        own = rollouts[int(generator("traces", seed, step).permutation(len(rollouts))[0])]
        rows.append(
            {
                "step": step, "task": own.task_id, "outcome": own.verdict.outcome, "reward": own.reward,
                "forwards": own.trajectory.forwards, "tokens": own.trajectory.num_tokens,
                "policy": own.trajectory.policy.label(), "completion": own.text, "detail": own.verdict.detail,
            }
        )  # fmt: skip
    return rows


def spread(credits: Sequence[Credit]) -> dict[str, float]:
    """How a step's rollouts are spread: share of each outcome class; least, median, 95th percentile and most of what
    the means stand for."""
    rollouts = [credit.rollout for credit in credits]
    outcomes = Counter(rollout.verdict.outcome for rollout in rollouts)
    # Those that did not occur as well: a chart with holes would not show that a class is gone.
    shares = {f"rollout/outcome/{name}": outcomes[name] / len(rollouts) for name in get_args(Outcome)}
    return shares | (
        spread_of("rollout/forwards", [rollout.trajectory.forwards for rollout in rollouts])
        | spread_of("rollout/tokens", [rollout.trajectory.num_tokens for rollout in rollouts])
        | spread_of("perf/sandbox_seconds", [rollout.verdict.seconds for rollout in rollouts])
    )


def spread_of(name: str, values: Sequence[float]) -> dict[str, float]:
    """`NAME_min`, `_p50`, `_p95` and `_max`."""
    marks = np.percentile(np.asarray(values, dtype=np.float64), (0, 50, 95, 100))
    return dict(zip((f"{name}_{mark}" for mark in ("min", "p50", "p95", "max")), marks.tolist(), strict=True))
