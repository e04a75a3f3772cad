"""The record of a sequence, taken from its canvas."""

from __future__ import annotations

import numpy as np

from fewstep.actors.engine.canvas import Canvases
from fewstep.actors.engine.scheduler import Sequence
from fewstep.platform.records import FinishReason, Trajectory, WeightVersion


def record(
    canvases: Canvases,
    sequence: Sequence,
    end: int,
    num_tokens: int,
    reason: FinishReason,
    version: WeightVersion,
) -> Trajectory:
    """How a sequence came to be, up to absolute position `end`.

    Args:
        num_tokens: those that count; version: the weights it ended with.
    """
    request = sequence.request
    start = len(request.prompt_ids)
    canvas = (sequence.slot, slice(start, end))
    edits = sequence.edits
    return Trajectory(
        prompt_ids=np.array(request.prompt_ids, np.int32),
        canvas_ids=canvases.tokens[canvas].cpu().numpy().astype(np.int32),
        step_map=canvases.step_map[canvas].cpu().numpy().copy(),
        confidence=canvases.confidence[canvas].cpu().numpy().copy(),
        logprob=canvases.logprob[canvas].cpu().numpy().copy(),
        num_tokens=num_tokens,
        forwards=sequence.forwards,
        finish_reason=reason,
        policy=request.policy,
        seed=request.policy.seed,
        weight_version_first=str(sequence.first_version),
        weight_version_last=str(version),
        edit_position=np.array([edit.position for edit in edits], np.int32),
        edit_step=np.array([edit.step for edit in edits], np.int16),
        edit_token=np.array([edit.token for edit in edits], np.int32),
        edit_logprob=np.array([edit.logprob for edit in edits], np.float32),
        cache_drift=float(np.mean(sequence.drifts)) if sequence.drifts else 0.0,
        suffix_ids=np.array(request.suffix_ids, np.int32),
    )
