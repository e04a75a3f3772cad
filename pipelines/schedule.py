"""The learning rate over a run: linear warm-up, constant, linear decay."""

from __future__ import annotations


def rate_share(step: int, done: float, *, warmup_steps: int, decay_share: float, floor: float = 0.0) -> float:
    """Share of the configured learning rate at a step, from 0 to 1.

    Args:
        step: counted from 0; the first of `warmup_steps` already learns.
        done: share of the run that lies behind.
        decay_share: last share of the run over which the rate falls linearly to zero; 0 = it does not fall.
        floor: the decay ends here.
    """
    rate = min(1.0, (step + 1) / max(1, warmup_steps))
    return min(rate, max(floor, (1.0 - done) / decay_share)) if decay_share else rate
