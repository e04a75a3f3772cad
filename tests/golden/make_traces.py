"""Writes traces.json: what the embedded model does on a few prompts. Run it only when a change means to move them.

    python tests/golden/make_traces.py

Kept are answers whose every decision has a margin, so that another processor's rounding cannot flip them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.model.checkpoint import embedded_model, load_model, state_checksum
from fewstep.pipelines.tasks.family import tasks
from fewstep.platform.records import DecodePolicy, Trajectory, WeightVersion

TRACES = Path(__file__).with_name("traces.json")
POLICIES = (
    DecodePolicy(kind="static", tokens_per_step=1),
    DecodePolicy(kind="threshold", threshold=0.9),
    DecodePolicy(kind="static", tokens_per_step=4, temperature=0.8, top_p=0.95, seed=7),
)
MARGIN = 2e-3


def record(trajectory: Trajectory) -> dict[str, object]:
    """The exact part of a trace."""
    return {
        "completion_ids": trajectory.completion_ids.tolist(),
        "step_map": trajectory.step_map[: trajectory.num_tokens].tolist(),
        "forwards": trajectory.forwards,
        "finish_reason": trajectory.finish_reason,
    }


def has_margin(trajectory: Trajectory) -> bool:
    """Whether no confidence of a committed token lies close to the threshold."""
    confidence = trajectory.confidence[~np.isnan(trajectory.confidence)]
    return bool((np.abs(confidence - trajectory.policy.threshold) > MARGIN).all())


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(embedded_model())
    engine = Engine(model, tokenizer, weight_version=WeightVersion("golden", 0, ""))
    traces = []
    for policy in POLICIES:
        kept = 0
        for task in tasks(40, 11, held_out=True):
            prompt = tuple(tokenizer.encode(task.prompt).ids)
            (trajectory,) = engine.generate([Request("golden", prompt, policy, max_tokens=80)])
            if kept < 4 and has_margin(trajectory):
                kept += 1
                traces.append({"prompt": task.prompt, "policy": policy.model_dump(), **record(trajectory)})
    content = {"weights": state_checksum(model.state_dict()), "torch": torch.__version__, "traces": traces}
    TRACES.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
