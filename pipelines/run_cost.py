"""What a refinement cost: seconds by stage, rollouts, tokens, forwards, processor time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.platform.artifacts import machine_info

_STAGES = ("generate", "extract", "verify", "credit", "train", "push")


def run_cost(
    history: Sequence[Mapping[str, float]], rollouts_per_step: int, total_seconds: float
) -> dict[str, Any]:
    """The bill, from a run's history.

    Args:
        history: one row of metrics a step; `perf/STAGE_seconds`, `rollout/*_per_answer`, `perf/step_seconds`.
        rollouts_per_step: prompts times group size.
        total_seconds: wall time of the whole job, measurements before and after included.
    Returns:
        seconds by stage (`other` is the rest of the steps, `outside` what the job did around them), counts, and
        `core_seconds`: wall time times the cores the job could use.
    """
    seconds = {name: sum(row.get(f"perf/{name}_seconds", 0.0) for row in history) for name in _STAGES}
    steps = sum(row.get("perf/step_seconds", 0.0) for row in history)
    seconds["other"] = max(0.0, steps - sum(seconds.values()))
    seconds["outside"] = max(0.0, total_seconds - steps)
    tokens = sum(row.get("rollout/tokens_per_answer", 0.0) for row in history)
    forwards = sum(row.get("rollout/forwards_per_answer", 0.0) for row in history)
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "num_rollouts": len(history) * rollouts_per_step,
        "num_tokens": round(tokens * rollouts_per_step),
        "num_forwards": round(forwards * rollouts_per_step),
        "core_seconds": round(total_seconds * int(machine_info()["cores"]), 1),
    }
